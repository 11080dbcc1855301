"""Chats and replies from a row's cells, in the formats of public data sets; nothing in a turn is dropped in silence.

A turn is {"role", "content"}, or ShareGPT's {"from", "value"}; its content is text or a list of text parts. Other keys of
earlier turns (tool_calls, name, tool_call_id) are kept for the chat template.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from opd_lightning.tasks.rows import check_utf8, text
from opd_lightning.types import Messages

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
    "function_call": "assistant",
}
"""The roles of data sets, and those of chat templates, few of which have "developer" or "human"."""

BEYOND_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking", "audio", "images")
"""Keys of a reply with information beside its content."""

TRAINED = ("weight", "train", "training", "trainable", "loss", "compute_loss")
"""Keys of a turn by which other programs choose the turns that are trained."""

PARTIAL = ("mask", "training_detail", "train_detail")
"""Keys of a turn whose meaning differs between programs, or that choose parts of its text."""

CHAT_LIKE = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:.*\]\s*""", re.DOTALL)
"""A text that begins and ends like a list of turns."""


def chat(prompt: Any, place: str) -> tuple[Messages, str | None]:
    """The chat up to the answer, and the answer if the chat ends with it.

    Args:
        prompt: the user's turn; or a whole chat as a list of turns, or as the JSON text of one.
        place: the row's place, for errors.

    Raises:
        ValueError: a turn is malformed, or has parts that cannot be rendered.
    """
    raw_turns = turns(prompt, place)
    if raw_turns is None:
        content = text(prompt, "prompt", place)
        if content is None:
            raise ValueError(f"{place}: the prompt is empty.")
        return [{"role": "user", "content": content}], None
    messages = [turn(one, place) for one in raw_turns]
    if raw_turns and raw_turns[-1].get("function_call"):
        messages[-1]["function_call"] = raw_turns[-1]["function_call"]  # a reply's error names the row's own key
    answered = (
        assistant_text(messages.pop(), "reply to learn", place) if messages and messages[-1]["role"] == "assistant" else None
    )
    if not messages:
        raise ValueError(f"{place}: the chat has no turn to answer.")
    messages[-1].pop("function_call", None)
    return check_utf8(messages, f"{place}: the chat"), answered


def reply(value: Any, part: str, place: str) -> str | None:
    """The text of a completion, which may be a list of one assistant turn.

    Raises:
        ValueError: it is a longer chat, or has more than text.
    """
    raw_turns = turns(value, place)
    if raw_turns is None:
        return text(value, part, place)
    messages = [turn(one, place) for one in raw_turns]
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{place}: the {part} is a chat of {roles}, not one turn of the assistant; map a whole chat as the prompt "
            "(task.columns.prompt=<column>), whose last turn is the completion."
        )
    return check_utf8(assistant_text(messages[0], part, place), f"{place}: the {part}")


def turns(value: Any, place: str) -> list[Any] | None:
    """The turns of a chat, which may be JSON text; None where the value is no chat.

    Raises:
        ValueError: a text looks like a chat and is no JSON, such as the repr of a Python list.
    """
    if isinstance(value, dict) and is_turn(value):
        return [value]
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        if CHAT_LIKE.fullmatch(value):
            raise ValueError(
                f"{place}: {value.strip()[:60]!r} looks like a chat and is no JSON ({error}); write it with json.dumps, or as "
                "a list in .jsonl or .parquet."
            ) from error
        return None
    if isinstance(parsed, dict):
        parsed = parsed.get("messages", parsed.get("conversations", [parsed]))
    return parsed if isinstance(parsed, list) and parsed and all(is_turn(one) for one in parsed) else None


def is_turn(value: Any) -> bool:
    """Whether a value has a turn's role and content."""
    return (
        isinstance(value, dict)
        and bool({"role", "from"} & set(value))
        and bool({"content", "value", "tool_calls"} & set(value))
    )


def turn(raw: Any, place: str) -> dict[str, Any]:
    """A turn in the form of chat templates; keys beside role and content are kept, except those without a value.

    Raises:
        ValueError: its role is unknown, or its content no text.
    """
    wrong = ValueError(f"{place}: a turn of the chat is {str(raw)[:60]!r}, not {{'role': 'user', 'content': '...'}}.")
    if not isinstance(raw, dict):
        raise wrong
    fields = {key: value for key, value in raw.items() if value is not None and value != []}  # tables fill up with nulls
    for name, alias in (("role", "from"), ("content", "value")):
        if name not in fields and alias in fields:
            fields[name] = fields.pop(alias)
    role = fields.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise wrong
    content = fields.pop("content", None)
    if role == "function_call":
        fields["tool_calls"], content = [tool_call(content, place)], ""
    if "function_call" in fields:  # the older format of APIs, with one call
        fields["tool_calls"] = [tool_call(fields.pop("function_call"), place)]
    if content is None and "tool_calls" not in fields:
        raise wrong
    return {"role": ROLES[role], "content": joined(content, wrong, place), **json.loads(json.dumps(fields, default=str))}


def joined(content: Any, wrong: ValueError, place: str) -> str:
    """The text of a content, which may be a list of parts; "" where a turn has only calls."""
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


def tool_call(call: Any, place: str) -> dict[str, Any]:
    """A function call, given as an object or its JSON, in the form of tool_calls; arguments are unchanged."""
    try:
        parsed = json.loads(call) if isinstance(call, str) else call
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, Mapping) or "name" not in parsed:
        raise ValueError(f"{place}: a call is {str(call)[:60]!r}, not {{'name': ..., 'arguments': {{...}}}}; mend the row.")
    return {"type": "function", "function": dict(parsed)}


def assistant_text(message: Mapping[str, Any], part: str, place: str) -> str | None:
    """The text of an assistant's turn for training; None for blanks.

    Raises:
        ValueError: it has keys of `BEYOND_TEXT`, or is marked as one that is not trained.
    """
    check_marks(message, part, place)
    if beyond := next((key for key in ("function_call", *BEYOND_TEXT) if message.get(key)), None):
        raise ValueError(
            f"{place}: the {part} has {beyond}, which a completion of text would lose; write it into the content as the "
            "model's template does (task.prepare), or leave such rows out (task.bad_rows=skip)."
        )
    return text(message["content"], part, place)


def check_marks(message: Mapping[str, Any], part: str, place: str) -> None:
    """Check that a reply is not excluded from training by a key of its turn.

    Raises:
        ValueError: it is, in whole or in part, or counts more or less than others.
    """
    out = "leave such rows out (task.bad_rows=skip), or remove the key where the reply is to be learned (task.prepare)."
    if partial := next((key for key in PARTIAL if key in message), None):
        shown = str(message[partial])[:40]
        raise ValueError(f"{place}: the {part} has {partial}={shown}, which programs read in different ways; {out}")
    for key in TRAINED:
        value = message.get(key)
        if value is None or value in (True, "true", "True", "1"):  # 1 and 1.0 equal True
            continue
        if value in (False, "false", "False", "0"):
            raise ValueError(f"{place}: the {part} has {key}={value}, so it is not to be trained; {out}")
        raise ValueError(f"{place}: the {part} has {key}={str(value)[:40]}, and replies here count alike; {out}")


def marked(messages: Messages) -> bool:
    """Whether a turn before the reply is marked for training by a key of its own."""
    return any(message.get(key) in (True, "true", "True", "1") for message in messages for key in TRAINED)
