"""Reference completions against the token limit: references that are cut never teach the end of a reply."""

from collections.abc import Iterator, Sequence
from typing import Any

from opd_lightning.config.limits import LEAST
from opd_lightning.contracts import Renderer, Task
from opd_lightning.preflight.results import CheckResult
from opd_lightning.rollout.dataset import reference_sample, reply_ids
from opd_lightning.types import Example

MARKERS = 16
"""Upper bound of the template's tokens around the text of a reply or a turn."""


def size(example: Example) -> int:
    """An upper bound of a reference's trainable tokens: its bytes and its markers."""
    turns = [turn for turn in example.reference or [] if turn["role"] == "assistant"]
    calls = sum(4 * len(str(value).encode()) for turn in turns for key, value in turn.items() if key not in ("role", "content"))
    return sum(len(str(turn["content"]).encode()) + MARKERS for turn in turns) + calls


def tokens_of(example: Example, renderer: Renderer) -> int:
    """The trainable tokens of a reference, with its end tokens."""
    try:
        return len(reply_ids(renderer, example)) if example.turns is None else reference_sample(renderer, example).trainable
    except ValueError:  # the template renders prompt and chat differently; see `replies`
        return sum(len(renderer.reply(str(turn["content"]))) for turn in example.reference or [])


def long_references(examples: Sequence[Example], renderer: Renderer, limit: int) -> dict[str, int]:
    """The tokens of the references that exceed a limit, by example id; short ones are not tokenized."""
    candidates = [e for e in examples if e.reference is not None and size(e) > limit]
    return {e.id: n for e in candidates if (n := tokens_of(e, renderer)) > limit}


def drop_long(examples: Sequence[Example], renderer: Renderer, limit: int) -> list[Example]:
    """The examples whose reference ends within a limit; raises ValueError if none is left."""
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
    for example in sorted((e for e in examples if e.reference is not None), key=size, reverse=True):
        if size(example) <= longest:
            break
        longest = max(longest, tokens_of(example, renderer))
    return longest


def limit_for(task: Task, renderer: Renderer, window: int) -> int:
    """The max_new_tokens of a task that does not set it: 128, or more if the longest training reference has more.

    Args:
        window: of the student, in tokens. The longest prompt and the limit fit into it together; prompts of more than half
            of it do not count, for they are refused or dropped.
    """
    examples = task.examples("train")
    limit = max(LEAST, longest_reference(examples, renderer))
    prompts = [rendered_size(e, renderer) for e in examples if prompt_size(e) + limit > window]
    room = window - max([n for n in prompts if n <= window // 2], default=0)
    return min(limit, room)


def rendered_size(example: Example, renderer: Renderer) -> int:
    """The tokens of a prompt; 0 where the template refuses it, which another check reports."""
    try:
        return len(renderer.render(example.messages, example.tools).token_ids)
    except ValueError:
        return 0


def prompt_size(example: Example) -> int:
    """An upper bound of a chat's tokens: its bytes and its markers."""
    return sum(len(str(message).encode()) + MARKERS for message in example.messages)


def references(parts: Any) -> Iterator[CheckResult]:
    """Check results on the references of SFT against the token limit.

    Args:
        parts: the run's `Components`.
    """
    if not parts.rollout.reads_references:
        return
    limit = reference_limit(parts.rollout)
    examples = [e for e in parts.examples if e.reference is not None]
    yield from long_conversations([e for e in examples if e.turns is not None], parts)
    long = long_references(examples, parts.renderer, limit)
    if not long:
        yield CheckResult("references", "pass", f"all {len(examples)} end within {limit} new tokens")
        return
    lengths, n = sorted(long.values(), reverse=True), len(examples)
    longest_id = max(long, key=lambda name: long[name])
    remedy = f"task.max_new_tokens={lengths[0]} fits all"
    if (allowed := n // 100) and allowed < len(lengths):
        remedy = f"task.max_new_tokens={lengths[allowed]} fits 99 %, {lengths[0]} all"
    consequence = "none teaches how a reply ends" if len(long) == n else "those never teach how a reply ends"
    yield CheckResult(
        "references",
        "warn",
        f"{len(long)} of {n} references ({len(long) / n:.1%}) are longer than rollout.sampling.max_new_tokens={limit} and are "
        f"cut there, so {consequence}; the longest has {lengths[0]} tokens (example {longest_id}). {remedy} (the model reads "
        f"{parts.model.window()} at once), data.overlong=drop leaves the long ones out.",
    )


def long_conversations(examples: Sequence[Example], parts: Any) -> Iterator[CheckResult]:
    """Check results on conversations of references that the model cannot read at once."""
    window = parts.model.window()
    for example in examples:
        if size(example) + prompt_size(example) + sum(len(str(turn).encode()) for turn in example.turns or []) <= window:
            continue
        try:
            length = len(reference_sample(parts.renderer, example).token_ids)
        except ValueError:
            continue  # see `replies`
        if length > window:
            text = f"the conversation of example {example.id} has {length} tokens, and the model reads {window} at once"
            yield CheckResult("references", "fail", f"{text}; shorten it, or leave such rows out (task.prepare).")
            return


def reference_limit(rollout: Any) -> int:
    """The token limit of references; in a mixture, that of its other rollout."""
    return int(getattr(rollout, "other", rollout).sampling.max_new_tokens)
