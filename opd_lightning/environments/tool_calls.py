"""Formats of tool calls in replies: each reads the calls of a reply's text, special tokens included.

`format_of` chooses one by what a chat template writes for a call.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

PROBE = {"name": "probe", "arguments": {"value": 1, "text": "x"}}
"""A call that chat templates are asked to write."""
DEEPEST = 64
"""Values within values, of the arguments of a call; templates write them by recursion."""


@dataclass(frozen=True)
class Calls:
    """The tool calls of a reply.

    Attributes:
        content: the text beside them.
        calls: {"name", "arguments"} each, the arguments an object.
        errors: what is wrong with calls that cannot be read.
    """

    content: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Hermes:
    """JSON between tags: <tool_call>{"name": ..., "arguments": {...}}</tool_call> (Qwen2.5, Qwen3, Hermes)."""

    most: int | None = None
    """Calls that the template writes in one turn; None has no limit."""

    def read(self, text: str) -> Calls:
        """The calls of a reply; a tag that is not closed reaches to the end."""
        content, *blocks = re.split(r"<tool_call>", text)
        return gathered(content.strip(), [block.partition("</tool_call>")[0] for block in blocks])


class Llama3:
    """A reply that is JSON alone: {"name": ..., "parameters": {...}}, behind <|python_tag|> or not (Llama 3.1 to 3.3)."""

    most: int | None = 1
    """See `Hermes`; templates of this family refuse a turn with more."""

    def read(self, text: str) -> Calls:
        """The call of a reply; several stand one behind the other, with ";" or blanks between them."""
        before, tag, behind = text.partition("<|python_tag|>")
        rest = (behind if tag else text).strip()
        if not tag and not (rest.startswith("{") and '"name"' in rest):
            return Calls(text)
        blocks, decoder = [], json.JSONDecoder()
        while rest:
            try:
                _, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                end = len(rest)
            blocks.append(rest[:end])
            rest = rest[end:].lstrip("; \n")
        return gathered(before.strip() if tag else "", blocks)


class Mistral:
    """A list of JSON behind a special token: [TOOL_CALLS][{"name": ..., "arguments": {...}}] (Mistral)."""

    most: int | None = None
    """See `Hermes`."""

    def read(self, text: str) -> Calls:
        """The calls of a reply."""
        content, tag, behind = text.partition("[TOOL_CALLS]")
        if not tag:
            return Calls(text)
        try:
            found, _ = json.JSONDecoder().raw_decode(behind.strip())
        except (ValueError, RecursionError) as error:
            return Calls(content.strip(), [], [f"the calls are no JSON ({error})"])
        return gathered(content.strip(), found if isinstance(found, list) else [found])


FORMATS: dict[str, Any] = {"hermes": Hermes(), "llama3": Llama3(), "mistral": Mistral()}


def gathered(content: str, blocks: list[Any]) -> Calls:
    """The calls of JSON texts or objects."""
    calls, errors = [], []
    for block in blocks:
        try:
            value = json.loads(block) if isinstance(block, str) else block
            arguments = value.get("arguments", value.get("parameters", {}))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(value["name"], str) or not isinstance(arguments, dict):
                raise ValueError("a call has a name, a text, and arguments, an object")
            calls.append(writable({"name": value["name"], "arguments": arguments}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            errors.append(f"the call {str(block).strip()[:80]!r} cannot be read ({type(error).__name__}: {error})")
    return Calls(content, calls, errors)


def writable(call: dict[str, Any]) -> dict[str, Any]:
    """A call that chat templates can write.

    Raises:
        ValueError: it has half of a surrogate pair, which is no text, or values within values that go too deep.
    """
    text = json.dumps(call, ensure_ascii=False)
    text.encode()
    depth = max(accumulate((c in "[{") - (c in "]}") for c in text), default=0)  # brackets in texts count, which is harmless
    if depth > DEEPEST:
        raise ValueError(f"it has values within values to a depth of {depth}")
    return call


def format_of(renderer: Any) -> Any | None:
    """The format in which a chat template writes calls; None where it writes none, or in no known format."""
    user = {"role": "user", "content": "x"}
    function = {"name": PROBE["name"], "arguments": PROBE["arguments"]}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}
    try:
        text = renderer.template.text([user, call], reply_follows=False)
        prompt = renderer.template.text([user], reply_follows=True)
    except ValueError:
        return None
    written = text.removeprefix(prompt)
    for token in map(str, renderer.tokenizer.convert_ids_to_tokens(renderer.end_ids)):
        written = written.strip().removesuffix(token)
    return next((form for form in FORMATS.values() if form.read(written).calls == [PROBE]), None)
