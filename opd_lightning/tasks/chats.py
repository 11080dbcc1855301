"""Chats and replies out of a row's cells, in the ways that data sets write them; nothing in a turn is lost in silence.

A turn is {"role", "content"}, or ShareGPT's {"from", "value"}; its content is text or a list of text parts. Other keys of
earlier turns (tool_calls, name, tool_call_id) stay, for the chat template to render.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from opd_lightning.tasks.rows import text, written
from opd_lightning.types import Messages

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
    "function_call": "assistant",
}
"""The roles of data sets, and of chat templates: hardly one of these knows "developer" or "human"."""

BEYOND_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking", "audio", "images")
"""Keys of a reply that say what its content does not."""

LOOKS = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:.*\]\s*""", re.DOTALL)
"""A text that begins and ends as a list of turns does."""


def chat(prompt: Any, place: str) -> tuple[Messages, str | None]:
    """A chat up to where the answer begins, and the answer if the chat has it.

    Args:
        prompt: the user's turn; or a whole chat as a list of turns, or as the JSON text of one.
        place: of the row, for errors.

    Raises:
        ValueError: a turn is none, or has what cannot be rendered.
    """
    given = turns(prompt, place)
    if given is None:
        content = text(prompt, "prompt", place)
        if content is None:
            raise ValueError(f"{place}: the prompt is empty.")
        return [{"role": "user", "content": content}], None
    messages = [turn(one, place) for one in given]
    answered = worded(messages.pop(), "reply to learn", place) if messages and messages[-1]["role"] == "assistant" else None
    if not messages:
        raise ValueError(f"{place}: the chat has no turn to answer.")
    return written(messages, f"{place}: the chat"), answered


def reply(value: Any, part: str, place: str) -> str | None:
    """The text of a completion, which may be written as a list of one assistant's turn.

    Raises:
        ValueError: it is a longer chat, or says more than its text.
    """
    given = turns(value, place)
    if given is None:
        return text(value, part, place)
    messages = [turn(one, place) for one in given]
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{place}: the {part} is a chat of {roles}, not one turn of the assistant; map a whole chat as the prompt "
            "(task.columns.prompt=<column>), whose last turn is the completion."
        )
    return written(worded(messages[0], part, place), f"{place}: the {part}")


def turns(value: Any, place: str) -> list[Any] | None:
    """The turns of a chat, also of one as JSON text; None where the value is no chat.

    Raises:
        ValueError: a text looks like a chat and is no JSON, such as Python's way of writing a list.
    """
    if isinstance(value, dict) and is_turn(value):
        return [value]
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return None
    try:
        read = json.loads(value)
    except (ValueError, RecursionError) as error:
        if LOOKS.fullmatch(value):
            raise ValueError(
                f"{place}: {value.strip()[:60]!r} looks like a chat and is no JSON ({error}); write it with json.dumps, or as "
                "a list in .jsonl or .parquet."
            ) from error
        return None
    if isinstance(read, dict):
        read = read.get("messages", read.get("conversations", [read]))
    return read if isinstance(read, list) and read and all(is_turn(one) for one in read) else None


def is_turn(value: Any) -> bool:
    """Does it say who speaks, and what?"""
    return (
        isinstance(value, dict)
        and bool({"role", "from"} & set(value))
        and bool({"content", "value", "tool_calls"} & set(value))
    )


def turn(given: Any, place: str) -> dict[str, Any]:
    """One turn as chat templates take it; what it has beside role and content stays, but for keys without a value.

    Raises:
        ValueError: its role is unknown, or its content no text.
    """
    wrong = ValueError(f"{place}: a turn of the chat is {str(given)[:60]!r}, not {{'role': 'user', 'content': '...'}}.")
    if not isinstance(given, dict):
        raise wrong
    said = {key: value for key, value in given.items() if value is not None and value != []}  # tables fill up with nulls
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in said and theirs in said:
            said[ours] = said.pop(theirs)
    role = said.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise wrong
    content = said.pop("content", None)
    if role == "function_call":
        said["tool_calls"], content = [called(content, place)], ""
    if "function_call" in said:  # as APIs wrote a call before there were several
        said["tool_calls"] = [called(said.pop("function_call"), place)]
    if content is None and "tool_calls" not in said:
        raise wrong
    return {"role": ROLES[role], "content": joined(content, wrong, place), **json.loads(json.dumps(said, default=str))}


def joined(content: Any, wrong: ValueError, place: str) -> str:
    """The text of a content that may come in parts; "" where a turn has calls alone."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong
    for part in content:
        if isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            continue
        kind = part.get("type", "nameless") if isinstance(part, dict) else type(part).__name__
        raise ValueError(
            f"{place}: a turn of the chat has a part that is no text ({kind}); models here read text alone, so leave such "
            "rows out (task.bad_rows=skip, task.prepare)."
        )
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def called(call: Any, place: str) -> dict[str, Any]:
    """A call of a function, an object or the JSON of one, as tool_calls have it; its arguments stay as they are."""
    try:
        read = json.loads(call) if isinstance(call, str) else call
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, Mapping) or "name" not in read:
        raise ValueError(f"{place}: a call is {str(call)[:60]!r}, not {{'name': ..., 'arguments': {{...}}}}; mend the row.")
    return {"type": "function", "function": dict(read)}


def worded(message: Mapping[str, Any], part: str, place: str) -> str | None:
    """The text of an assistant's turn that is learned; blanks are None.

    Raises:
        ValueError: it has what a completion of text would lose.
    """
    if beyond := next((key for key in BEYOND_TEXT if message.get(key)), None):
        raise ValueError(
            f"{place}: the {part} has {beyond}, which a completion of text would lose; write it into the content as the "
            "model's template words it (task.prepare), or leave such rows out (task.bad_rows=skip)."
        )
    return text(message["content"], part, place)
