"""Chat templates: a chat as text and as token ids; special tokens in the text of turns are tokenized as text."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from opd_lightning.types import Messages

RARE = range(0x3400, 0x4DB5)
"""Characters that are rare in texts, and that Python and JSON print without escapes."""


CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""A template's call for the date, with a literal format."""
ANCHORS = ("\n", ".", "=", "a")
"""Prefixes for tokenizing a continuation; one of them does not merge with the text behind it."""


class ChatTemplate:
    """A tokenizer's chat template with its options.

    Args:
        tokenizer: the tokenizer with the template.
        options: keyword arguments for the template.
        split_special_tokens: a special token's text in a turn, such as "<|im_end|>", is tokenized as text; False makes it the
            token. Tokens that are added to a vocabulary and not special, such as "<think>", are always tokens.
        today: the date for `strftime_now` in the template; None takes that of the call.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: dict[str, Any],
        split_special_tokens: bool = True,
        today: datetime | None = None,
    ):
        self.tokenizer, self.options = tokenizer, options
        self.split_special_tokens, self.today = split_special_tokens, today
        self.special = special_pattern(tokenizer) if split_special_tokens else None

    def text(self, messages: Messages, reply_follows: bool, **options: Any) -> str:
        """The chat as rendered by the template.

        Args:
            reply_follows: end with the generation prompt (`add_generation_prompt`).

        Raises:
            ValueError: the template refuses the chat, for example because it has no system role.
        """
        if self.dated and self.today is not None:
            options["chat_template"] = self.source(options.get("tools"))
        options |= {"add_generation_prompt": reply_follows, "tokenize": False, **self.options}
        try:
            text = str(self.tokenizer.apply_chat_template(messages, **options))
            if quoted_twice(messages, text):
                text = str(self.tokenizer.apply_chat_template(with_objects(messages), **options))
            return text
        except TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template of the model is no Jinja (line {error.lineno}: {error}); mend it, or give "
                "model.chat_template=<file>."
            ) from error
        except TemplateError as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise ValueError(
                f"the chat template of the model refuses a chat of {roles} ({error}); leave out what it lacks "
                "(task.system=null, or context.system=null with context.turns), or give model.chat_template=<file>."
            ) from error
        except Exception as error:  # a template is a program of the user's, and can fail in every way
            raise ValueError(
                f"the chat template of the model fails ({type(error).__name__}: {error}); give model.chat_template=<file>."
            ) from error

    def ids(self, messages: Messages, reply_follows: bool, **options: Any) -> list[int]:
        """Token ids of the chat; see `text`."""
        text, spans = self.spans(messages, reply_follows, **options)
        return self.encode(text, spans)

    def spans(self, messages: Messages, reply_follows: bool, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The chat's text, and the spans of special tokens in the text of turns."""
        text = self.text(messages, reply_follows, **options)
        spelled = spellings(messages, self.special) if self.special is not None else []
        if self.special is None or not spelled:
            return text, []
        # A second rendering with unused characters in their place separates the turns' text from the template's own.
        all_text = f"{messages}{self.tokenizer.chat_template}"
        unused = (chr(code) for code in RARE if chr(code) not in all_text)
        marks = dict(zip(spelled, unused, strict=False))
        marked = self.text(replaced(messages, self.special, marks), reply_follows, **options)
        original = {character: token for token, character in marks.items()}
        spans, shift = [], 0
        for place, character in enumerate(marked):
            if character in original:
                token = original[character]
                spans.append((place + shift, place + shift + len(token)))
                shift += len(token) - 1
        assert all(text[start:end] in marks for start, end in spans), "the template words special tokens in turns by their text"
        return text, spans

    def encode(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        """Token ids of a rendered text; special tokens within the spans are tokenized as text."""
        if not spans:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins, ids = {start for start, _ in spans}, list[int]()
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if start in begins and end > start:
                ids += self.encode_special(text[start:end])
            else:
                ids.append(token)
        return ids

    def encode_continuation(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        """Token ids of a text that continues another, without the blank that SentencePiece puts before a text."""
        for anchor in ANCHORS:
            n, anchor_ids = len(anchor), self.encode(anchor, [])
            ids = self.encode(anchor + text, [(start + n, end + n) for start, end in spans])
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self.encode(text, spans)

    def encode_special(self, text: str) -> list[int]:
        """Token ids of a special token's text as text; see `encode_continuation`."""
        ids: list[int] = self.tokenizer(ANCHORS[0] + text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids[len(self.encode(ANCHORS[0], [])) :]

    def pinned(self, template: str) -> str:
        """The template with the date of `today` in place of calls of `strftime_now`."""
        assert self.today is not None
        return CALL.sub(lambda call: repr(self.today.strftime(call[2])), template)  # type: ignore[union-attr]

    def source(self, tools: list[Any] | None = None) -> str:
        """The template's own text, with the date of the run's start."""
        source = str(self.tokenizer.get_chat_template(tools=tools))
        return self.pinned(source) if self.dated and self.today is not None else source

    @property
    def dated(self) -> bool:
        """Whether the template writes a date."""
        return "strftime_now" in str(self.tokenizer.chat_template)


def described(tools: Sequence[Any] | None) -> dict[str, Any]:
    """The template's arguments for the schemas of tools; none without tools."""
    return {"tools": list(tools)} if tools else {}


def quoted_twice(messages: Messages, text: str) -> bool:
    """Whether a rendered chat has the arguments of a call as a text of JSON in quotes: APIs give them as text."""
    given = [call["function"].get("arguments") for turn in messages for call in calls_of(turn)]
    return any(isinstance(value, str) and value.strip() and json.dumps(value, ensure_ascii=False) in text for value in given)


def with_objects(messages: Messages) -> Messages:
    """The chat with the arguments of calls as objects where they are JSON texts of objects."""

    def parsed(call: dict[str, Any]) -> dict[str, Any]:
        try:
            value = json.loads(call["function"]["arguments"])
        except (TypeError, ValueError, KeyError, RecursionError):
            return call
        return {**call, "function": {**call["function"], "arguments": value}} if isinstance(value, dict) else call

    return [
        {**turn, "tool_calls": [parsed(call) for call in calls]} if (calls := calls_of(turn)) else turn for turn in messages
    ]


def calls_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a turn that name a function."""
    calls = turn.get("tool_calls") or []
    return [call for call in calls if isinstance(call, dict) and isinstance(call.get("function"), dict)]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of special tokens, those without a role among them."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern for the text of every special token; None where there is none."""
    special = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))]
    words = sorted((re.escape(word) for word in special if word.strip()), key=len, reverse=True)
    return re.compile("|".join(words)) if words else None


def spellings(messages: Messages, special: re.Pattern[str]) -> list[str]:
    """The special tokens in the text of turns, each once."""
    tokens: dict[str, None] = {}

    def collect(text: str) -> str:
        tokens.update(dict.fromkeys(special.findall(text)))
        return text

    mapped(messages, collect)
    return list(tokens)


def replaced(messages: Messages, special: re.Pattern[str], mark: dict[str, str]) -> Messages:
    """The chat with special tokens replaced by their marks."""
    return mapped(messages, lambda text: special.sub(lambda match: mark[match[0]], text))


def mapped(node: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A chat with a function applied to all its text, except roles and types."""
    if isinstance(node, str):
        return node if key in ("role", "type") else change(node)
    if isinstance(node, dict):
        return {name: mapped(value, change, str(name)) for name, value in node.items()}
    return [mapped(value, change) for value in node] if isinstance(node, list) else node
