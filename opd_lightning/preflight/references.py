"""Reference completions against the token limit: those that are cut never teach how a reply ends."""

from collections.abc import Iterator, Sequence
from typing import Any

from opd_lightning.config.limits import LEAST
from opd_lightning.contracts import Renderer, Task
from opd_lightning.preflight.findings import Finding
from opd_lightning.types import Example

BESIDE = 16
"""Tokens that a reply, or a turn of a chat, may have beside those of its text."""


def size(example: Example) -> int:
    """More tokens than a reference has: no tokenizer makes more of a text than it has bytes."""
    return len((example.completion or "").encode()) + BESIDE


def tokens_of(example: Example, renderer: Renderer) -> int:
    """The tokens of a reference, its end included."""
    text = example.completion or ""
    try:
        return len(renderer.reply(text, example.messages))
    except ValueError:  # the template words prompt and reply in two ways; see `replies`
        return len(renderer.reply(text))


def long_references(examples: Sequence[Example], renderer: Renderer, limit: int) -> dict[str, int]:
    """The tokens of the references that exceed a limit, by example id; only those that could are tokenized."""
    could = [e for e in examples if e.completion is not None and size(e) > limit]
    return {e.id: n for e in could if (n := tokens_of(e, renderer)) > limit}


def drop_long(examples: Sequence[Example], renderer: Renderer, limit: int) -> list[Example]:
    """The examples whose reference ends within a limit; raises ValueError if there are none."""
    long = long_references(examples, renderer, limit)
    if examples and len(long) == len(examples):
        raise ValueError(
            f"data.overlong=drop leaves none of the {len(examples)} training examples whose prompts fit: every reference is "
            f"longer than max_new_tokens={limit}, the longest has {max(long.values())}; raise task.max_new_tokens."
        )
    return [example for example in examples if example.id not in long]


def longest_reference(examples: Sequence[Example], renderer: Renderer) -> int:
    """The tokens of the longest reference; 0 where there is none."""
    longest = 0
    for example in sorted((e for e in examples if e.completion is not None), key=size, reverse=True):
        if size(example) <= longest:
            break
        longest = max(longest, tokens_of(example, renderer))
    return longest


def limit_for(task: Task, renderer: Renderer, window: int) -> int:
    """How many new tokens suit a task that leaves it to its data: 128, or more if the longest training reference has more.

    Args:
        window: of the student. Beside the longest prompt the limit stays within it; prompts of more than half of it do not
            count, for they are refused or dropped.
    """
    examples = task.examples("train")
    longest = longest_reference(examples, renderer)
    if not longest:
        return LEAST
    limit = max(LEAST, longest)
    prompts = [rendered_size(e, renderer) for e in examples if prompt_size(e) + limit > window]
    room = window - max([n for n in prompts if n <= window // 2], default=0)
    return min(limit, room)


def rendered_size(example: Example, renderer: Renderer) -> int:
    """The tokens of a prompt; 0 where the template refuses it, which is another check's."""
    try:
        return len(renderer.render(example.messages).token_ids)
    except ValueError:
        return 0


def prompt_size(example: Example) -> int:
    """Bytes of a chat with its marks, roughly."""
    return sum(len(str(message).encode()) + BESIDE for message in example.messages)


def references(parts: Any) -> Iterator[Finding]:
    """Do the references that are imitated fit the token limit?

    Args:
        parts: the run's `Components`.
    """
    if not parts.rollout.reads_references:
        return
    limit = reference_limit(parts.rollout)
    examples = [e for e in parts.examples if e.completion is not None]
    long = long_references(examples, parts.renderer, limit)
    if not long:
        yield Finding("references", "pass", f"all {len(examples)} end within {limit} new tokens")
        return
    lengths, n = sorted(long.values(), reverse=True), len(examples)
    worst = max(long, key=lambda name: long[name])
    most = f"task.max_new_tokens={lengths[0]} fits all"
    if (spared := n // 100) and spared < len(lengths):
        most = f"task.max_new_tokens={lengths[spared]} fits 99 %, {lengths[0]} all"
    cost = "none teaches how a reply ends" if len(long) == n else "those never teach how a reply ends"
    yield Finding(
        "references",
        "warn",
        f"{len(long)} of {n} references ({len(long) / n:.1%}) are longer than rollout.sampling.max_new_tokens={limit} and are "
        f"cut there, so {cost}; the longest has {lengths[0]} tokens (example {worst}). {most} (the model reads "
        f"{parts.model.window()} at once), data.overlong=drop leaves the long ones out.",
    )


def reference_limit(rollout: Any) -> int:
    """The limit of those who write references: a mixture's other writer has its own."""
    return int(getattr(rollout, "other", rollout).sampling.max_new_tokens)
