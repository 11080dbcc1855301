"""Every row through the chat template, before anything is trained: what it refuses, and what it leaves out in silence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_lightning.contracts import Renderer, Task
from opd_lightning.preflight.findings import Finding
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, Messages

SPLITS = ("train", "validation", "test")


def check_rows(task: Task, renderer: Renderer, contexts: Mapping[str, NoContext]) -> None:
    """Rows of the task that cannot be rendered leave it, if it leaves bad rows out.

    Args:
        renderer: the student's.
        contexts: what words the prompts of each reader, the student's first.

    Raises:
        ValueError: a row cannot be rendered, and the task does not leave bad rows out.
    """
    examples = list({e.id: e for split in SPLITS for e in task.examples(split)}.values())
    reasons = unreadable(examples, renderer, contexts)
    if not reasons:
        return
    leave_out = getattr(task, "leave_out", None)
    if leave_out is None:
        raise ValueError(f"{next(iter(reasons.values()))} ({len(reasons)} such examples)")
    leave_out(reasons)


def unreadable(examples: Sequence[Example], renderer: Renderer, contexts: Mapping[str, NoContext]) -> dict[str, str]:
    """Why examples cannot be rendered for one of the readers, a sentence by example id."""
    found: dict[str, str] = {}
    plain: list[dict] = []
    for name, context in contexts.items():
        if type(context) is NoContext:
            if context.template_options in plain:
                continue  # the same prompts as another reader's
            plain.append(context.template_options)
        words = renderer.with_options(context.template_options)  # type: ignore[attr-defined]
        system_known = False
        for example in examples:
            try:
                chat = context(example)
            except ValueError:  # it lacks what the context quotes, which is another check's
                continue
            if chat is None or example.id in found:
                continue
            try:
                text = as_text(words, chat)
            except ValueError as error:
                found[example.id] = f"the {name}'s prompt of example {example.id}: {error}"
                continue
            lost = left_out(words, chat, text, system_known) if len(chat) > 1 else None
            if lost:
                found[example.id] = (
                    f"the {name}'s prompt of example {example.id} lacks {lost}: the chat template leaves it out. Give "
                    "model.chat_template=<file>, or word it in the question."
                )
                continue
            system_known |= chat[0]["role"] == "system"
    return found


def as_text(words: Renderer, chat: Messages) -> str:
    """A chat as the template writes it, without tokens, which would take longer; raises ValueError if it is refused."""
    try:
        return str(
            words.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **words.template_options)
        )
    except Exception:  # the renderer has the sentence for it
        return str(words.render(chat).token_ids)


def left_out(words: Renderer, chat: Messages, text: str, system_known: bool) -> str | None:
    """What of a chat the template's text does not hold: a system or tool turn, calls of tools, or the content beside them.

    Args:
        system_known: system turns were looked for in another chat.
    """
    for i, turn in enumerate(chat):
        without: list[tuple[str, dict[str, Any] | None]] = []
        if turn["role"] == "tool" or (turn["role"] == "system" and not system_known and turn["content"].strip()):
            without.append((f"its {turn['role']} turn {turn['content'][:40]!r}", None))
        if turn.get("tool_calls"):
            without.append((f"its tool calls {str(turn['tool_calls'])[:60]}", {**turn, "tool_calls": []}))
            if turn["content"].strip():
                without.append((f"{turn['content'][:40]!r} beside its tool calls", {**turn, "content": ""}))
        for what, other in without:
            changed = [*chat[:i], *([] if other is None else [other]), *chat[i + 1 :]]
            try:
                if as_text(words, changed) == text:
                    return what
            except ValueError:  # a template that minds the change has seen it
                continue
    return None


def left_rows(parts: Any) -> Iterator[Finding]:
    """What the task says of its rows: those that are left out, and columns that nobody reads.

    Args:
        parts: the run's `Components`.
    """
    notes = getattr(parts.task, "notes", {})
    if n := notes.get("skipped_rows"):
        first = notes["skipped_list"][0]
        yield Finding("data", "warn", f"{n} malformed rows are left out, the first: {first}; status.json lists them.")
    for sentence in notes.get("warnings", []):
        yield Finding("data", "warn", sentence)
