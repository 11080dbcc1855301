"""Rendering: token ids of a chat by the model's chat template, and of the replies in it."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.data.chat_template import RARE, ChatTemplate, described, special_ids
from opd_lightning.data.conversations import conversation_of
from opd_lightning.types import Conversation, Messages, Rendered
from opd_lightning.utils.vocabulary import ValidIds

PROBE = "\u220e"
"""The text of a test reply, which does not occur in templates."""


class ChatRenderer:
    """A tokenizer with its chat template.

    Args:
        tokenizer: the model's.
        template_options: keyword arguments for the chat template, such as {"enable_thinking": False}.
        end_token: the token that ends a reply, and the only one; None takes the one that the template writes behind a reply,
            or EOS, and knows both.
        split_special_tokens, today: see `ChatTemplate`.

    Raises:
        ValueError: `end_token` is no token of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_options: dict | None = None,
        end_token: str | None = None,
        split_special_tokens: bool = True,
        today: datetime | None = None,
    ):
        self.tokenizer, self.template_options = tokenizer, template_options or {}
        self.template = ChatTemplate(tokenizer, self.template_options, split_special_tokens, today)
        self.end_token = end_token
        if end_token is not None and end_token not in tokenizer.get_vocab():
            raise ValueError(f"model.end_token={end_token!r} is no token of the model's tokenizer; give one of its tokens.")

    @cached_property
    def valid_ids(self) -> ValidIds:
        """The ids that are tokens of the tokenizer."""
        return ValidIds.of(self.tokenizer.get_vocab())

    def with_options(self, template_options: dict | None) -> "ChatRenderer":
        """A renderer of the same tokenizer with other template options."""
        split, today = self.template.split_special_tokens, self.template.today
        return ChatRenderer(self.tokenizer, template_options, self.end_token, split, today)

    @cached_property
    def tail(self) -> list[int]:
        """The ids of special tokens that the template writes behind a reply."""
        try:
            chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
            text = self.template.text(chat, reply_follows=False)
        except ValueError:
            return []  # reported when the examples are rendered
        special = special_ids(self.tokenizer)
        return [token for token in self.template.encode(text.rpartition(PROBE)[2], []) if token in special]

    @cached_property
    def end_id(self) -> int:
        """The id of the token that ends a reply."""
        if self.end_token is not None:
            return int(self.tokenizer.get_vocab()[self.end_token])
        return int(self.tail[0] if self.tail else self.tokenizer.eos_token_id)

    @cached_property
    def end_ids(self) -> list[int]:
        """Every id that ends a reply: the chosen `end_token` alone, or else those of `known_ends`."""
        return self.known_ends if self.end_token is None else [self.end_id]

    @cached_property
    def known_ends(self) -> list[int]:
        """The ids of `end_token`, EOS, and the token that the template writes behind a reply; no reference has them twice."""
        return sorted({self.end_id, int(self.tokenizer.eos_token_id), *self.tail[:1]})

    def render(self, messages: Messages, tools: Sequence[Any] | None = None) -> Rendered:
        """The prompt of a chat, up to the assistant's reply; raises ValueError if the template refuses it."""
        return Rendered(self.template.ids(messages, reply_follows=True, **described(tools)))

    def conversation(self, messages: Messages, turns: Messages, tools: Sequence[Any] | None = None) -> Conversation:
        """The tokens of a chat with several replies; see `data.conversations`."""
        return conversation_of(self, messages, turns, tools)

    def reply(self, text: str, messages: Messages | None = None, tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of an assistant's reply with its end token, as in the rendered chat behind the prompt.

        Args:
            text: the reply; an end token at its end is not counted as text.
            messages: the chat before it; None tokenizes the text alone.
            tools: JSON schemas of the functions that the prompt describes.

        Raises:
            ValueError: the template renders the prompt differently in a chat with the reply.
        """
        text = self.without_end(text)
        if messages is None:
            return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.end_id]
        chat = [*messages, {"role": "assistant", "content": text}]
        reply_ids, _ = self.continuation(chat, tools)
        n_ends = sum(token in self.known_ends for token in self.tail)
        ends = [i for i, token in enumerate(reply_ids) if token in self.known_ends][-n_ends:] if n_ends else []
        return [*(reply_ids[: ends[0]] if ends else reply_ids), self.end_id]

    def continuation(self, chat: Messages, tools: Sequence[Any] | None = None) -> tuple[list[int], bool]:
        """Token ids behind the prompt of the last turn, and whether prompt and these ids are the tokens of the rendered chat.

        They are not where the chat's tokens do not begin with the prompt's, for example if a blank line at the border is one
        token in the chat and two in its parts. The student reads the prompt's own tokens, so the reply is tokenized separately.

        Raises:
            ValueError: the chat's text does not begin with the prompt's.
        """
        prompt_ids, chat_ids = self.render(chat[:-1], tools).token_ids, self.template.ids(chat, False, **described(tools))
        if chat_ids[: len(prompt_ids)] == prompt_ids:
            return chat_ids[len(prompt_ids) :], True
        prompt = self.template.text(chat[:-1], reply_follows=True, **described(tools))
        text, spans = self.template.spans(chat, reply_follows=False, **described(tools))
        if not text.startswith(prompt):
            at = next(i for i, (a, b) in enumerate(zip(prompt + "\0", text + "\1", strict=False)) if a != b)
            raise ValueError(
                f"the chat template of the model writes {prompt[at : at + 30]!r} before a reply is generated and "
                f"{text[at : at + 30]!r} in a chat with that reply, so what is trained would not be what is read; set "
                "model.template_options, or give model.chat_template=<file> in which both begin alike."
            )
        n = len(prompt)
        return self.template.encode_continuation(text[n:], [(start - n, end - n) for start, end in spans if start >= n]), False

    def without_end(self, text: str) -> str:
        """A reply without end tokens at its end, and the blanks behind them."""
        ends = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.known_ends]
        while (end := next((e for e in ends if text.rstrip().endswith(e)), None)) is not None:
            text = text.rstrip().removesuffix(end)
        return text

    def between(
        self, messages: Messages, reply: str | dict[str, Any], answers: Messages, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids between the reply's end token and the next reply.

        The student's own tokens stay before them, also the thoughts that a template drops from earlier turns.

        Args:
            messages: the chat before the reply.
            reply: the reply's text, or its turn with tool calls.
            answers: the messages behind the reply.
            tools: JSON schemas of the functions that the prompt describes.

        Raises:
            ValueError: the template does not write earlier replies as they were given.
        """
        chat = [*messages, {"role": "assistant", "content": reply} if isinstance(reply, str) else reply]
        before, begin = self.template.ids(chat, False, **described(tools)), len(self.render(messages, tools).token_ids)
        after = self.render([*chat, *answers], tools).token_ids
        ends = [i for i, token in enumerate(before) if token in self.known_ends and i >= begin]
        cut = ends[-1] + 1 if ends else len(before)
        return after[cut:] if after[:cut] == before[:cut] else self.behind_any(messages, answers, tools)

    def behind_any(self, messages: Messages, answers: Messages, tools: Sequence[Any] | None) -> list[int]:
        """Token ids behind the end of a reply of other words, where the template drops a part of the reply itself."""
        written = f"{messages}{answers}{tools}{self.tokenizer.chat_template}"
        probe = next(chr(code) for code in RARE if chr(code) not in written)
        chat = [*messages, {"role": "assistant", "content": probe}, *answers]
        text, spans = self.template.spans(chat, reply_follows=True, **described(tools))
        at = text.find(probe) + len(probe)
        ends = "|".join(re.escape(str(self.tokenizer.convert_ids_to_tokens(i))) for i in self.known_ends)
        if text.count(probe) != 1 or (end := re.compile(rf"\s*(?:{ends})").match(text, at)) is None:
            raise ValueError(
                "the chat template of the model rewrites earlier turns when others follow, so a conversation cannot go on from "
                "the tokens that were written; use another model, or environment=single_turn."
            )
        n = end.end()
        return self.template.encode_continuation(text[n:], [(a - n, b - n) for a, b in spans if a >= n])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, **template_options) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins; see `ChatRenderer.render`."""
    return ChatRenderer(tokenizer, template_options).render(messages).token_ids


def with_template_options(renderer: ChatRenderer, template_options: dict | None) -> ChatRenderer:
    """A renderer with other template options, for evaluations whose prompts differ from those of training."""
    return renderer.with_options(template_options)
