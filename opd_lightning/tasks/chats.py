"""Chats and replies from a row's cells, in the formats of public data sets; nothing in a turn is dropped in silence.

A turn is {"role", "content"}, or ShareGPT's {"from", "value"}; its content is text or a list of text parts. Other keys of
earlier turns (tool_calls, name, tool_call_id) are kept for the chat template.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from opd_lightning.data.conversations import UNTRAINED, learned
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
"""Keys of a reply with information beside its content, which a completion of text would lose."""


PARTIAL = ("mask", "training_detail", "train_detail")
"""Keys of a turn whose meaning differs between programs, or that choose parts of its text."""

CHAT_LIKE = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:.*\]\s*""", re.DOTALL)
"""A text that begins and ends like a list of turns."""


def chat(prompt: Any, place: str) -> Messages:
    """The turns of a prompt.

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
        return [{"role": "user", "content": content}]
    return check_utf8([turn(one, place) for one in raw_turns], f"{place}: the chat")


def replies(value: Any, part: str, place: str) -> Messages:
    """The turns of a completion: a text, or turns that begin and end with one of the assistant; none for blanks.

    Raises:
        ValueError: it begins or ends with another turn.
    """
    raw_turns = turns(value, place)
    if raw_turns is None:
        content = text(value, part, place)
        return [] if content is None else [{"role": "assistant", "content": content}]
    found = [turn(one, place) for one in raw_turns]
    if not found or found[0]["role"] != "assistant" or found[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in found)
        raise ValueError(
            f"{place}: the {part} is a chat of {roles}, which begins or ends with no turn of the assistant; map a whole chat "
            "as the prompt (task.columns.prompt=<column>), whose last turn is the completion."
        )
    return check_utf8(found, f"{place}: the {part}")


def transcript(messages: Messages) -> str | None:
    """Turns as a text, for a teacher's prompt: a single reply alone, others behind their roles; None for blanks."""

    def content(message: Mapping[str, Any]) -> str:
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
        return "\n".join(part for part in (message["content"], *calls) if part.strip())

    if len(messages) == 1:
        return content(messages[0]) or None
    return "\n".join(f"{message['role']}: {content(message)}" for message in messages) or None


def learning(messages: Messages, answers: Messages, train_on: str, place: str) -> tuple[Messages, Messages]:
    """The prompt, and the turns behind it from the first reply that is learned to the last one; none where there is no reply.

    Args:
        messages: a chat, whose last turn may be a reply.
        answers: the turns of a completion column, which takes the place of that reply; other replies are then not learned.
        train_on: "last", the last reply, or "all", every reply that is not marked otherwise (weight: 0, train: false).

    Raises:
        ValueError: there are two completions, or a reply has a mark that programs read in different ways.
    """
    ends = bool(messages) and messages[-1]["role"] == "assistant"
    if answers and ends:
        *messages, last = messages
        if not blank(last) and transcript([last]) != transcript(answers):
            raise ValueError(
                f"{place}: task.columns.completion and the chat's last turn give two completions; leave one out (task.prepare)."
            )
    whole, first = (messages + answers, len(messages)) if answers else (messages, 0 if ends else len(messages))
    asked = next((i for i, turn in enumerate(whole) if turn["role"] == "user"), 0)  # a greeting before it answers nothing
    candidates = [i for i in range(max(first, asked), len(whole)) if whole[i]["role"] == "assistant"]
    for i in candidates if train_on == "all" else candidates[-1:]:
        check_reply(whole[i], "reply to learn", place, skippable=train_on == "all" and len(candidates) > 1)
    chosen = [i for i in candidates if learned(whole[i]) and not blank(whole[i])] if train_on == "all" else candidates[-1:]
    if candidates and not chosen:
        raise ValueError(f"{place}: every reply is marked as not trained; leave such rows out (task.bad_rows=skip).")
    if not whole[: chosen[0] if chosen else len(whole)]:
        raise ValueError(f"{place}: the chat has no turn to answer.")
    if not chosen or blank(whole[chosen[-1]]):  # a last reply of blanks alone
        return whole[: candidates[-1] if candidates else len(whole)], []
    return whole[: chosen[0]], whole[chosen[0] : chosen[-1] + 1]


def blank(message: Mapping[str, Any]) -> bool:
    """Whether a turn has neither text nor calls."""
    return not message["content"].strip() and not message.get("tool_calls")


def is_text(messages: Messages) -> bool:
    """Whether turns are one reply of text alone, which is a completion."""
    return len(messages) == 1 and not any(messages[0].get(key) for key in BEYOND_TEXT)


def tools_of(value: Any, place: str) -> list[dict[str, Any]] | None:
    """The JSON schemas of a row's tools, given as a list, one schema, or their JSON; None for an empty cell.

    Raises:
        ValueError: they are no schemas.
    """
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: the tools are {str(value)[:60]!r}, no JSON ({error}); give JSON schemas.") from error
    found = [found] if isinstance(found, dict) else found
    if isinstance(found, list):
        found = [parsed(one) for one in found]
    if not found or (isinstance(found, float) and math.isnan(found)):
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{place}: the tools are {str(value)[:60]!r}; give a list of JSON schemas, [{{'name': ...}}].")
    schemas = [{"type": "function", "function": one} if "name" in one and "function" not in one else one for one in found]
    for one in schemas:
        if not isinstance(one.get("function"), dict) or not isinstance(one["function"].get("name"), str):
            raise ValueError(f"{place}: a tool is {str(one)[:60]!r}, which has no name; give a JSON schema of a function.")
    return check_utf8(json.loads(json.dumps(schemas, default=str)), f"{place}: the tools")


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
    if "tool_calls" in fields:
        fields |= {"tool_calls": calls} if (calls := calls_of(fields.pop("tool_calls"), place)) else {}
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
    found = parsed(call)
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        raise ValueError(f"{place}: a call is {str(call)[:60]!r}, not {{'name': ..., 'arguments': {{...}}}}; mend the row.")
    return {"type": "function", "function": dict(found)}


def calls_of(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a turn, given as a list, one call, or their JSON; each may lack the "function" around name and arguments.

    Raises:
        ValueError: one has no name.
    """
    found = parsed(value)
    calls = [parsed(one) for one in (found if isinstance(found, list) else [found] if found else [])]
    made = []
    for call in calls:
        inside = call.get("function") if isinstance(call, Mapping) else None
        outer = {k: v for k, v in call.items() if v is not None} if isinstance(inside, Mapping) else {}
        made.append({**outer, **tool_call(call if inside is None else inside, place)})
    return made


def parsed(value: Any) -> Any:
    """The value of a JSON text; other values and other texts as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def check_reply(message: Mapping[str, Any], part: str, place: str, skippable: bool = False) -> None:
    """Check that a reply is not excluded from training by a key of its turn, and is text, thoughts and calls alone.

    Args:
        skippable: it may be marked as one that is not trained.

    Raises:
        ValueError: it is, in whole or in part, or counts more or less than others, or has parts that are no text.
    """
    if other := next((key for key in ("audio", "images") if message.get(key)), None):
        raise ValueError(f"{place}: the {part} has {other}; models here write text alone, leave such rows out.")
    out = "leave such rows out (task.bad_rows=skip), or remove the key where the reply is to be learned (task.prepare)."
    if partial := next((key for key in PARTIAL if key in message), None):
        shown = str(message[partial])[:40]
        raise ValueError(f"{place}: the {part} has {partial}={shown}, which programs read in different ways; {out}")
    for key in UNTRAINED:
        value = message.get(key)
        if value is None or value in (True, "true", "True", "1"):  # 1 and 1.0 equal True
            continue
        if value in (False, "false", "False", "0") and skippable:
            continue
        if value in (False, "false", "False", "0"):
            raise ValueError(f"{place}: the {part} has {key}={value}, so it is not to be trained; {out}")
        raise ValueError(f"{place}: the {part} has {key}={str(value)[:40]}, and replies here count alike; {out}")


def marked(messages: Messages) -> bool:
    """Whether a turn before the reply is marked for training by a key of its own."""
    return any(message.get(key) in (True, "true", "True", "1") for message in messages for key in UNTRAINED)
