"""The chat template on every row, before training: rows that it refuses, and turns that it leaves out in silence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from opd_lightning.contracts import Environment, Renderer, Task
from opd_lightning.data.chat_template import described
from opd_lightning.preflight.results import CheckResult
from opd_lightning.rollout.dataset import begun
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, Messages

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a reply's thoughts."""
SPLITS = ("train", "validation", "test")


def as_played(
    examples: Sequence[Example], environment: Callable[[], Environment] | None, errors: dict[str, str] | None = None
) -> list[Example]:
    """The examples with the messages with which an environment begins their episodes; None leaves them as they are.

    Args:
        errors: takes a sentence by example id where an episode cannot begin; with None such examples stay as they are.
    """
    if environment is None or getattr(environment, "remote", False):  # a server would begin an episode for each
        return list(examples)
    played = []
    for example in examples:
        try:
            shown = begun(environment, example)
            if not (shown.messages and all(isinstance(turn["role"] + turn["content"], str) for turn in shown.messages)):
                raise ValueError("it gives no messages")
            played.append(shown)
        except Exception as error:  # an environment is a program of the user's
            if errors is None:
                played.append(example)
            else:
                text = f"{type(error).__name__}: {error}"
                errors[example.id] = (
                    f"the environment cannot begin an episode of example {example.id} ({text}); mend its reset."
                )
    return played


def check_rows(
    task: Task,
    renderer: Renderer,
    contexts: Mapping[str, NoContext],
    environment: Callable[[], Environment] | None = None,
    own_renderers: Mapping[str, Renderer] = MappingProxyType({}),
) -> None:
    """Remove rows that cannot be rendered from the task, if it leaves bad rows out.

    Args:
        renderer: the student's.
        contexts: the contexts of all readers by name, the student's first.
        environment: makes the episodes of training examples; None leaves prompts as they are.
        own_renderers: of those readers that have another tokenizer.

    Raises:
        ValueError: a row cannot be rendered, and the task does not leave bad rows out.
    """
    examples = list({e.id: e for split in SPLITS for e in task.examples(split)}.values())
    reasons: dict[str, str] = {}
    if environment is not None:
        examples += as_played(
            task.examples("train"), environment, reasons
        )  # beside the rows themselves, which are rendered too
    reasons = rendering_errors(examples, renderer, contexts, own_renderers) | reasons
    if not reasons:
        return
    leave_out = getattr(task, "leave_out", None)
    if leave_out is None:
        raise ValueError(f"{next(iter(reasons.values()))} ({len(reasons)} such examples)")
    leave_out(reasons)


def rendering_errors(
    examples: Sequence[Example],
    renderer: Renderer,
    contexts: Mapping[str, NoContext],
    own_renderers: Mapping[str, Renderer] = MappingProxyType({}),
) -> dict[str, str]:
    """The errors of examples that cannot be rendered for one of the readers, a sentence by example id."""
    errors: dict[str, str] = {}
    plain: list[dict] = []
    for name, context in contexts.items():
        if type(context) is NoContext and name not in own_renderers:
            if context.template_options in plain:
                continue  # the same prompts as another reader's
            plain.append(context.template_options)
        options_renderer = own_renderers.get(name, renderer).with_options(context.template_options)  # type: ignore[attr-defined]
        system_checked = False
        for example in examples:
            try:
                chat = context(example)
            except ValueError:  # it lacks the part that the context quotes, which another check reports
                continue
            if chat is None or example.id in errors:
                continue
            try:
                text = as_text(options_renderer, chat, example.tools)
            except ValueError as error:
                errors[example.id] = f"the {name}'s prompt of example {example.id}: {error}"
                continue
            omitted = None
            if len(chat) > 1 or example.tools:
                omitted = omission(options_renderer, chat, text, system_checked, example.tools)
            if omitted is None and example.turns is not None and name == "student":
                whole = [*chat, *example.turns]
                try:
                    text = as_text(options_renderer, whole, example.tools, reply_follows=False)
                except ValueError as error:
                    errors[example.id] = f"the conversation of example {example.id}: {error}"
                    continue
                omitted = omission(options_renderer, whole, text, True, example.tools, len(chat))
            if omitted:
                errors[example.id] = (
                    f"the {name}'s prompt of example {example.id} lacks {omitted}: the chat template leaves it out. Give "
                    "model.chat_template=<file>, or put it into the question."
                )
                continue
            system_checked |= chat[0]["role"] == "system"
    return errors


def as_text(renderer: Renderer, chat: Messages, tools: Sequence[Any] | None = None, reply_follows: bool = True) -> str:
    """The rendered text of a chat, which is faster than its tokens; raises ValueError if the template refuses it."""
    try:
        return str(
            renderer.tokenizer.apply_chat_template(
                chat,
                add_generation_prompt=reply_follows,
                tokenize=False,
                **described(tools),
                **renderer.template_options,
            )
        )
    except Exception:  # the renderer raises it as one sentence
        return str(renderer.render(chat, tools).token_ids)


def omission(
    renderer: Renderer,
    chat: Messages,
    text: str,
    system_checked: bool,
    tools: Sequence[Any] | None = None,
    prompt: int | None = None,
) -> str | None:
    """The part of a chat that the template leaves out: a system or tool turn, tool calls, the content beside them, or tools.

    Args:
        system_checked: system turns were checked in another chat.
        prompt: turns of the prompt, behind which a reference follows whose thoughts count too; None where no reference does.
    """
    if tools and prompt is None:
        with suppress(ValueError):
            if as_text(renderer, chat) == text:
                return f"the descriptions of its {len(tools)} tools"
    for i, turn in enumerate(chat):
        if i < (prompt or 0):
            continue
        without: list[tuple[str, dict[str, Any] | None]] = []
        if turn["role"] == "tool" or (turn["role"] == "system" and not system_checked and turn["content"].strip()):
            without.append((f"its {turn['role']} turn {turn['content'][:40]!r}", None))
        if turn.get("tool_calls"):
            names = ", ".join(str(call.get("function", call).get("name")) for call in turn["tool_calls"])
            without.append((f"its tool calls ({names[:60]})", {**turn, "tool_calls": []}))
            if turn["content"].strip():
                without.append((f"{turn['content'][:40]!r} beside its tool calls", {**turn, "content": ""}))
        if prompt is not None and (key := next((key for key in THOUGHTS if turn.get(key)), None)):
            without.append((f"its {key} {str(turn[key])[:40]!r}", {k: v for k, v in turn.items() if k not in THOUGHTS}))
        for part, replacement in without:
            changed = [*chat[:i], *([] if replacement is None else [replacement]), *chat[i + 1 :]]
            try:
                if as_text(renderer, changed, tools, prompt is None) == text:
                    return part
            except ValueError:  # a template that needs the part renders it
                continue
    return None


def left_rows(parts: Any) -> Iterator[CheckResult]:
    """Check results on the task's rows: malformed ones that are left out, columns found by their names, and unread ones.

    Args:
        parts: the run's `Components`.
    """
    notes = getattr(parts.task, "notes", {})
    if n := notes.get("skipped_rows"):
        first = notes["skipped_list"][0]
        yield CheckResult("data", "warn", f"{n} malformed rows are left out, the first: {first}; status.json lists them.")
    if sentence := notes.get("columns"):
        yield CheckResult("data", "pass", sentence)
    for sentence in notes.get("warnings", []):
        yield CheckResult("data", "warn", sentence)
