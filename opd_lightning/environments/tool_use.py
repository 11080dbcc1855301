"""ToolUse: functions that the student calls in its replies, in the format of its chat template."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from opd_lightning.config.names import find
from opd_lightning.contracts import Task
from opd_lightning.environments.tool_calls import FORMATS, Calls, format_of
from opd_lightning.types import Example, Messages, Verdict
from opd_lightning.utils.threads import Failed, call_all

UNKNOWN = "unknown"
"""The name of a call that cannot be read."""


class ToolUse:
    """Answers calls of tools; a reply without a call ends the episode, and the task judges it.

    Args:
        task: judges the last reply.
        functions: the tools by name.
        schemas: their descriptions, which the chat template writes.
        form: reads the calls of a reply, see `tool_calls`.
        max_turns: replies; a call in the last one is not answered.
        seconds: for one call, which is answered with an error after them.
        max_characters: longer answers are cut.
        role: of the answers; those to one reply are one turn if it is not "tool".

    Attributes:
        metrics: numbers of the episode so far.
    """

    threaded = True
    keeps_special_tokens = True

    def __init__(
        self,
        task: Task,
        functions: Mapping[str, Callable[..., Any]],
        schemas: list[dict[str, Any]],
        form: Any,
        max_turns: int,
        seconds: float,
        max_characters: int,
        role: str,
    ):
        self.task, self.functions, self.tools, self.form = task, functions, schemas, form
        self.max_turns, self.seconds, self.max_characters, self.role = max_turns, seconds, max_characters, role
        self.errors: list[str] = []
        self.metrics = {"tool_calls": 0.0, "tool_errors": 0.0}
        self.turns = 0

    def reset(self, example: Example) -> Messages:
        """The example's chat."""
        self.example = example
        return example.messages

    def message(self, reply: str) -> dict[str, Any]:
        """A reply as a turn of the chat, with a call for each answer, as many as the template takes.

        What the student reads behind it are its own tokens. A call that cannot be read has a place of its own, since templates
        refuse answers without calls.
        """
        found = self.form.read(reply)
        named = [*found.calls, *[{"name": UNKNOWN, "arguments": {}}] * len(found.errors)][: self.form.most]
        calls = [{"id": identifier(i), "type": "function", "function": call} for i, call in enumerate(named)]
        turn = {"role": "assistant", "content": reply if found.errors else found.content}
        return turn | ({"tool_calls": calls} if calls and self.role == "tool" else {})

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The answers of the tools that a reply calls, at once; none at the end."""
        self.turns += 1
        found = self.form.read(reply)
        if self.turns >= self.max_turns or not (found.calls or found.errors):
            return [], None
        return self.answers(found), None

    def answers(self, found: Calls) -> Messages:
        """The turns of the tools, those of calls that cannot be read behind the others."""
        results = call_all([partial(self.call, call) for call in found.calls], self.seconds)
        texts = [f"error: {result.text}" if isinstance(result, Failed) else str(result) for result in results]
        texts += [f"error: {error}" for error in found.errors]
        names = [call["name"] for call in found.calls] + [UNKNOWN] * len(found.errors)
        self.metrics["tool_calls"] += len(texts)
        failed = [text for text in texts if text.startswith("error: ")]
        self.metrics["tool_errors"] += len(failed)
        self.errors += [text[:500] for text in failed]
        texts = [cut(text, self.max_characters) for text in texts]
        if self.role != "tool":  # templates without turns of tools have users and assistants alternate
            return [{"role": self.role, "content": "\n".join(texts)}]
        return [
            {"role": "tool", "tool_call_id": identifier(i), "name": name, "content": text}
            for i, (name, text) in enumerate(zip(names, texts, strict=True))
        ]

    def call(self, call: Mapping[str, Any]) -> str:
        """The result of a call, as text; of objects as JSON."""
        function = self.functions.get(call["name"])
        if function is None:
            raise LookupError(f"there is no tool {call['name']!r}, but {', '.join(self.functions)}")
        result = function(**call["arguments"])
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    def verdict(self, reply: str) -> Verdict | None:
        """The task's verdict on the last reply; without feedback of its own, with the errors of the tools."""
        if not self.task.verifies:
            return None
        found = self.task.verify(self.example, reply)
        errors = "\n".join(self.errors) or None
        return Verdict(found.content, found.format, found.feedback or (errors if found.content < 1 else None))


def identifier(number: int) -> str:
    """The id of a call: nine characters, which some chat templates want."""
    return f"call{number:05d}"


def cut(text: str, characters: int) -> str:
    """A text with a note where it is cut."""
    return text if len(text) <= characters else f"{text[:characters]} ... (cut, {len(text)} characters)"


def tool_use(
    task: Task,
    renderer: Any,
    tools: str | Sequence[str],
    format: str = "auto",
    max_turns: int = 8,
    seconds: float = 10.0,
    max_characters: int = 4000,
    role: str = "tool",
) -> Callable[[], ToolUse]:
    """Makes a new episode each time it is called.

    Args:
        tools: dotted names of functions, or of modules, all of whose public functions are taken.
        format: "hermes", "llama3" or "mistral"; "auto" takes that of the chat template.

    Raises:
        ValueError: a function is not found or not described, or the template writes no calls in a known format.
    """
    for name, value, least in (("max_turns", max_turns, 1), ("seconds", seconds, 0.01), ("max_characters", max_characters, 1)):
        if value < least:
            raise ValueError(f"environment.{name}={value} must be at least {least}.")
    if format not in ("auto", *FORMATS):
        raise ValueError(f"environment.format={format!r} is unknown; choose auto, {', '.join(FORMATS)}.")
    form = format_of(renderer) if format == "auto" else FORMATS[format]
    if form is None:
        raise ValueError(
            "environment.format=auto: the chat template of the model writes no tool calls, or in a format that is not known; "
            f"choose one ({', '.join(FORMATS)}) and describe it in task.system, or give model.chat_template=<file>."
        )
    functions = functions_of([tools] if isinstance(tools, str) else list(tools))
    schemas = [schema_of(name, function) for name, function in functions.items()]
    check_role(renderer, role, schemas)
    return partial(ToolUse, task, functions, schemas, form, max_turns, seconds, max_characters, role)


def check_role(renderer: Any, role: str, schemas: list[dict[str, Any]]) -> None:
    """Raises ValueError if the chat template has no such turn behind a call."""
    call = {"id": identifier(0), "type": "function", "function": {"name": UNKNOWN, "arguments": {}}}
    calls = {"tool_calls": [call]} if role == "tool" else {}
    answer = {"role": role, "tool_call_id": identifier(0), "name": UNKNOWN, "content": "x"}
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", **calls}, answer]
    try:
        renderer.template.text(chat, reply_follows=True, tools=schemas)
    except ValueError as error:
        raise ValueError(
            f"environment.role={role}: the chat template of the model refuses such a turn behind a call ({error.__cause__}); "
            "set environment.role=user, or give model.chat_template=<file>."
        ) from error


def functions_of(names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The functions at dotted names, by their own; of modules the public ones."""
    functions: dict[str, Callable[..., Any]] = {}
    for name in names:
        try:
            found = find(name)
        except Exception as error:
            raise ValueError(f"environment.tools={name} cannot be imported ({error}); give package.module.function.") from error
        members = [found]
        if isinstance(found, ModuleType):
            defined = inspect.getmembers(found, inspect.isfunction)
            members = [f for key, f in defined if f.__module__ == found.__name__ and not key.startswith("_")]
        if not members or not all(callable(member) for member in members):
            raise ValueError(f"environment.tools={name} is no function, and no module with functions.")
        for member in members:
            check_tool(name, member, functions)
            functions[member.__name__] = member
    if not functions:
        raise ValueError("environment.tools is empty; name functions or a module (environment.tools=[my_tools.search]).")
    return functions


def check_tool(name: str, function: Callable[..., Any], others: Mapping[str, Callable[..., Any]]) -> None:
    """Raises ValueError if a function is asynchronous, or another one has its name."""
    if inspect.iscoroutinefunction(function):
        raise ValueError(
            f"environment.tools={name}: {function.__name__} is asynchronous; wrap it in one that waits (asyncio.run)."
        )
    if others.get(function.__name__, function) is not function:
        raise ValueError(f"environment.tools={name}: another tool is called {function.__name__} too; rename one.")


def schema_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and docstring; raises ValueError if it lacks them."""
    try:
        return get_json_schema(function)
    except Exception as error:
        raise ValueError(
            f"environment.tools: {name} is not described ({' '.join(str(error).split())}); give it type hints, and a docstring "
            'with "Args:" and a line "name: meaning" for each argument.'
        ) from error
