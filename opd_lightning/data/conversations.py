"""Conversations: the tokens of a chat with several replies, and which of them are learned, found from the chat template.

A template with `{% generation %}` tags says itself where replies stand. Others are rendered up to each reply and behind it:
both must be beginnings of the whole, so that what is learned is what the model reads when it writes that reply.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from opd_lightning.data.chat_template import described, with_objects
from opd_lightning.types import Conversation, Messages

Span = tuple[int, int]
TAGGED = re.compile(r"\{%-?\s*generation\s*-?%\}")
UNTRAINED = ("weight", "train", "training", "trainable", "loss", "compute_loss")
"""Keys of a turn by which other programs choose the turns that are trained."""

REWRITES = (
    "the chat template of the model rewrites earlier turns when others follow (it writes {0!r} and later {1!r}), so not all "
    "replies of a chat can be learned at once; set task.train_on=last, or give model.chat_template=<file> that leaves them as "
    "they were or marks replies with {{% generation %}}."
)


def learned(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is a reply that is not marked as untrained by a key of its own, such as weight: 0."""
    return turn["role"] == "assistant" and not any(turn.get(key) in (False, "false", "False", "0") for key in UNTRAINED)


def exchanges_of(turns: Messages) -> list[Messages]:
    """Replies that are learned, each with the turns behind it."""
    begins = [i for i, turn in enumerate(turns) if learned(turn)]
    return [turns[a:b] for a, b in zip(begins, [*begins, len(turns)][1:], strict=True)]


def conversation_of(renderer: Any, messages: Messages, turns: Messages, tools: Sequence[Any] | None = None) -> Conversation:
    """The tokens of a chat and the turns behind it, up to the end of the last reply.

    Args:
        renderer: a `ChatRenderer`.
        messages: the prompt.
        turns: begin with a reply that is learned and end with one.
        tools: JSON schemas of functions that the template describes.

    Raises:
        ValueError: the template rewrites earlier turns, or does not say where a reply ends.
    """
    template, chat = renderer.template, [*messages, *turns]
    text, spelled = template.spans(chat, reply_follows=False, **described(tools))
    find = tagged if TAGGED.search(template.source(list(tools or []) or None)) else prefixed
    spans = find(renderer, chat, len(messages), text, described(tools))
    text = text[: spans[-1][1]]
    return tokens_of(template, text, [span for span in spelled if span[1] <= len(text)], spans)


def prefixed(renderer: Any, chat: Messages, first: int, text: str, options: Mapping[str, Any]) -> list[Span]:
    """The spans of learned replies in the chat's text, from renderings of its beginnings."""
    spans = []
    for i in (i for i in range(first, len(chat)) if learned(chat[i])):
        before = renderer.template.text(chat[:i], reply_follows=True, **options)
        behind = renderer.template.text(chat[: i + 1], reply_follows=False, **options)
        end = end_of_reply(renderer, behind, len(before))
        for beginning in (before, behind[:end]):
            if not text.startswith(beginning):
                at = next(k for k, (a, b) in enumerate(zip(beginning + "\0", text + "\1", strict=False)) if a != b)
                raise ValueError(REWRITES.format(beginning[at : at + 30], text[at : at + 30]))
        spans.append((len(before), end))
    return spans


def tagged(renderer: Any, chat: Messages, first: int, text: str, options: Mapping[str, Any]) -> list[Span]:
    """The spans of learned replies in the chat's text, from the template's generation tags, with their end tokens."""
    template, tokenizer = renderer.template, renderer.tokenizer
    rendered: Any = render_jinja_template(
        conversations=[chat, with_objects(chat)],
        chat_template=template.source(options.get("tools")),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **template.options, **options},
    )
    found, marks = next((pair for pair in zip(*rendered, strict=True) if pair[0] == text), ("", []))
    replies = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
    if found != text or len(marks) != len(replies):
        raise ValueError(
            f"the chat template of the model marks {len(marks)} of {len(replies)} replies with {{% generation %}}; mark each "
            "once (model.chat_template=<file>), or set task.train_on=last."
        )
    spans = []
    for i, (start, end) in zip(replies, marks, strict=True):
        if i >= first and learned(chat[i]):
            # The end token may stand inside the tags, with blanks behind it, or directly behind them.
            rest = re.match(rf"\s*(?:{ends_pattern(renderer)})", text[end:])
            inside = list(re.finditer(ends_pattern(renderer), text[start:end]))
            closed = inside and not text[start:end][inside[-1].end() :].strip()
            spans.append((start, start + inside[-1].end() if closed else end + (rest.end() if rest else 0)))
    return spans


def ends_pattern(renderer: Any) -> str:
    """A pattern for the text of every end token, that of the template first."""
    ends = [*renderer.tail[:1], *renderer.end_ids]
    return "|".join(re.escape(str(renderer.tokenizer.convert_ids_to_tokens(i))) for i in dict.fromkeys(ends))


def end_of_reply(renderer: Any, text: str, start: int) -> int:
    """Where the last reply of a chat's text ends, with its end token.

    Raises:
        ValueError: no end token closes it.
    """
    for i in dict.fromkeys([*renderer.tail[:1], *renderer.end_ids]):
        end = str(renderer.tokenizer.convert_ids_to_tokens(i))
        if (at := text.rfind(end)) >= start:
            if renderer.end_token is not None and i != renderer.end_id:
                break
            return at + len(end)
    raise ValueError(
        f"the chat template of the model does not close replies with the end token "
        f"{renderer.tokenizer.convert_ids_to_tokens(renderer.end_id)!r}, so it is not known where replies of a chat end; give "
        "model.chat_template=<file>, or set task.train_on=last."
    )


def tokens_of(template: Any, text: str, spelled: Sequence[Span], spans: Sequence[Span]) -> Conversation:
    """The tokens of a chat's text, and which of them stand in the spans.

    Where a token of the whole spans the border of a reply, the parts are tokenized separately, as they are when a model writes.
    """
    borders = [at for span in spans for at in span]
    whole = template.encode(text, spelled)
    counts = []
    for at in borders:
        ids = template.encode(text[:at], [span for span in spelled if span[1] <= at])
        if whole[: len(ids)] != ids:
            break
        counts.append(len(ids))
    if exact := len(counts) == len(borders):
        ids = whole
    else:
        ids, counts = [], []
        for begin, end in zip([0, *borders], borders, strict=False):
            part = [(a - begin, b - begin) for a, b in spelled if begin <= a and b <= end]
            ids += (template.encode_continuation if begin else template.encode)(text[begin:end], part)
            counts.append(len(ids))
    mask = [False] * len(ids)
    for begin, end in zip(counts[::2], counts[1::2], strict=True):
        mask[begin:end] = [True] * (end - begin)
    return Conversation(ids, mask, counts[0], exact)
