"""Checks of the data before training: what is missing, too long, or on both sides of a split."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.losses.targets import FullLogits, SampledLogProbs, TopKLogProbs
from opd_lightning.models import Pretrained
from opd_lightning.preflight.rendering import as_played, rendering_errors
from opd_lightning.tasks.splits import key_of, near_duplicates
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, Tokens


def preflight(parts: Any) -> dict[str, Any]:
    """Make sure that training and evaluation have what they need.

    Args:
        parts: the run's `Components`.

    Returns:
        Counts of training and held-out examples, and of training prompts that nearly repeat a held-out one.

    Raises:
        ValueError: the first problem and its remedy.
    """
    examples, task, rollout, objective = parts.examples, parts.task, parts.rollout, parts.objective
    if not examples:
        raise ValueError("task has no training examples; check task.path and the task's other options.")
    judged = task.verifies or getattr(parts.environment, "judges", False)
    if objective.reads_verdicts and not judged:
        part = "loss.policy_gradient learns from verdicts alone" if objective.rewarded else "the loss reads verdicts"
        raise ValueError(
            f"task={type(task).__name__} has no verifier, and {part}; give it one "
            "(e.g. task/verifier=numeric, in Python verify=) or choose a method without rewards."
        )
    check_contexts(parts)
    check_objective(parts)
    if rollout.reads_references:
        check_references(examples)
    heldout = list({e.id: e for evaluation in parts.suite.values() for e in evaluation.examples}.values())
    check_disjoint(examples, heldout)
    if errors := rendering_errors(heldout, parts.renderer, {"student": NoContext(parts.model.template_options)}):
        raise ValueError(next(iter(errors.values())))
    for teacher in parts.teachers.values():
        teacher.check_examples(examples)
    longest = rollout.sampling.max_new_tokens
    readers, shown = parts.readers(), as_played(examples, parts.environment)
    model, context, renderer = readers["student"]
    check_lengths("rollout.sampling", shown, renderer, model, context, longest, "data")
    plain = NoContext(parts.model.template_options)
    check_lengths("task", heldout, parts.renderer, parts.model, plain, task.max_new_tokens, "data")
    for name, (model, context, renderer) in readers.items():
        check_turns_rendered(name, shown[0], renderer, context)
        if name != "student":
            check_lengths("rollout.sampling", shown, renderer, model, context, longest, "context")
    pairs = near_duplicates(examples, heldout)
    counts = {"train": len(examples), "heldout": len(heldout), "near_duplicates": len(pairs), "digest": digest(examples)}
    counts |= getattr(task, "notes", {})
    return counts | ({"near_duplicates_first": pairs[:5]} if pairs else {})


def check_contexts(parts: Any) -> None:
    """Raises ValueError if a context reads attempts without a verifier, or siblings where there are none."""
    for name, part in all_parts(parts.teachers):
        if part.context.needs_siblings and parts.rollout.sampling.n < 2:
            raise ValueError(
                f"rollout.num_generations=1 leaves a completion without siblings for the {name} to read; choose "
                "rollout=student_group, or context=feedback."
            )
        if part.context.needs_rollouts and not (parts.task.verifies or getattr(parts.environment, "judges", False)):
            raise ValueError(
                f"task={type(parts.task).__name__} has no verifier, and the context of the {name} takes verdicts; give it one "
                "(e.g. task/verifier=numeric, in Python verify=) or choose context=demonstration."
            )


def digest(examples: Sequence[Example]) -> str:
    """The digest of the training data; a run must not be resumed with other data."""
    fields = [[e.messages, e.completion, e.demonstration, e.solution, sorted(e.extra.items())] for e in examples]
    # Only where they are, so that the digests of runs on single replies stay.
    fields = [[*field, *([e.turns, e.tools] if e.turns or e.tools else [])] for field, e in zip(fields, examples, strict=True)]
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=8).hexdigest()


def check_objective(parts: Any) -> None:
    """Compute the loss of one token, to check that its parts accept this vocabulary and the teachers' targets.

    Raises:
        ValueError: a part does not.
    """
    zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1)
    logits = torch.zeros(1, parts.model.vocab_size())
    k = torch.arange(min(parts.model.vocab_size(), 1024))[None]
    kinds = {
        "full": FullLogits(logits),
        "topk": TopKLogProbs(k, torch.full(k.shape, -10.0), -one),
        "sampled": SampledLogProbs(-one),
    }
    provided = {name: parts.teachers[name].provides for name in parts.objective.teachers}
    targets: dict[str, Any] = {
        name: kinds[next(kind for kind in kinds if kind in provides)] for name, provides in provided.items()
    }
    try:
        tokens = Tokens(zero, zero, one, zero, one, one, group=zero, pass_rate=one, future=0 * one)
        parts.objective(logits, targets, tokens)
        if parts.objective.reads_scores:
            parts.objective.weights(replace(tokens, seen=parts.objective.observe(logits, targets, tokens)[1]), 1)
    except AttributeError as error:
        raise ValueError(
            f"loss: a part of it reads more of a teacher than it provides ({error}); choose another loss/gate, or "
            "a teacher of the whole vocabulary."
        ) from error


def check_references(examples: Sequence[Example]) -> None:
    """Raises ValueError unless every training example has a reference completion."""
    missing = [e.id for e in examples if e.reference is None]
    if missing:
        raise ValueError(
            f"rollout imitates reference completions, and {len(missing)} of {len(examples)} training examples have none, "
            f"example {missing[0]} first; map them (task.columns.completion=<column>), or choose a method whose student or "
            "teacher writes."
        )


def check_disjoint(examples: Sequence[Example], heldout: Sequence[Example]) -> None:
    """Raises ValueError if a held-out prompt is a training prompt."""
    train_ids = {key_of(e): e.id for e in examples}
    both = [(train_ids[key_of(e)], e.id) for e in heldout if key_of(e) in train_ids]
    if both:
        raise ValueError(
            f"task: {len(both)} held-out prompts are training prompts too (training example {both[0][0]} is held-out "
            f"{both[0][1]}), so the evaluation would measure memory; remove them from one side."
        )


def check_turns_rendered(side: str, example: Example, renderer: ChatRenderer, context: NoContext) -> None:
    """Check that the prompt has system turns and turns of the context: chat templates can leave out roles in silence.

    Args:
        side: the reader's name, for the error.

    Raises:
        ValueError: a turn is left out.
    """
    chat = context(example) or []
    for i, turn in enumerate(chat):
        if turn["role"] != "system" and turn in example.messages:
            continue
        without = [*chat[:i], *chat[i + 1 :]]
        try:
            options_renderer = renderer.with_options(context.template_options)
            same = options_renderer.render(without, example.tools) == options_renderer.render(chat, example.tools)
        except ValueError:  # a template that needs the turn renders it
            continue
        if same:
            raise ValueError(
                f"the {side}'s prompt of example {example.id} lacks its {turn['role']} turn {turn['content'][:40]!r}: the chat "
                "template leaves it out. Give model.chat_template=<file>, or put it into the question."
            )


def check_lengths(
    place: str,
    examples: Sequence[Example],
    renderer: ChatRenderer,
    model: Pretrained,
    context: NoContext,
    max_new_tokens: int,
    side: str,
) -> None:
    """Raises ValueError if a prompt from `context` exceeds its limit, or prompt and completion the model's window.

    Args:
        place: the configuration's node with max_new_tokens.
        side: the configuration's node with max_prompt_tokens: "data" for the student, "context" for a teacher.
    """
    window, limit = model.window(), context.max_prompt_tokens
    for example, tokens in long_prompts(examples, renderer, context, min(window - max_new_tokens, limit or window)):
        if limit is not None and tokens > limit:
            raise ValueError(
                f"example {example.id} has a prompt of {tokens} tokens, which exceeds {side}.max_prompt_tokens={limit}; raise "
                "it, or leave such examples out with data.overlong=drop."
            )
        raise ValueError(
            f"example {example.id} has a prompt of {tokens} tokens; with {place}.max_new_tokens={max_new_tokens} it "
            f"exceeds the {window} tokens that {model.field}={model.path} reads at once; shorten or remove it "
            f"(data.overlong=drop leaves it out), or lower {place}.max_new_tokens."
        )


def bytes_of(turn: Mapping[str, Any]) -> int:
    """Bytes of a turn's content and of its other keys, such as tool calls, with room for a template's indentation."""
    other_keys = sum(len(str(value).encode()) for key, value in turn.items() if key not in ("role", "content"))
    return len(turn["content"].encode()) + 4 * other_keys


def long_prompts(
    examples: Sequence[Example], renderer: ChatRenderer, context: NoContext, limit: int
) -> Iterator[tuple[Example, int]]:
    """The examples whose prompt exceeds a limit, each with its prompt's tokens."""
    options_renderer, template_tokens = renderer.with_options(context.template_options), None
    for example in examples:
        chat = context(example)
        if chat is None:  # made from attempts, in training
            continue
        # No tokenizer makes more tokens than bytes: only prompts that could be too long are tokenized here.
        if template_tokens is None:
            template_tokens = len(options_renderer.render(chat, example.tools).token_ids) + 64
        if template_tokens * len(chat) + sum(bytes_of(m) for m in chat) + 4 * len(str(example.tools or "").encode()) <= limit:
            continue
        tokens = len(options_renderer.render(chat, example.tools).token_ids)
        if tokens > limit:
            yield example, tokens


def drop_overlong(
    examples: Sequence[Example],
    readers: Sequence[tuple[Pretrained, NoContext, ChatRenderer]],
    max_new_tokens: int,
) -> list[Example]:
    """The examples whose prompts fit the limits and windows of all readers.

    Raises:
        ValueError: no example is left.
    """
    long: set[str] = set()
    for model, context, renderer in readers:
        window = model.window()
        limit = min(window - max_new_tokens, context.max_prompt_tokens or window)
        long |= {example.id for example, _ in long_prompts(examples, renderer, context, limit)}
    kept = [example for example in examples if example.id not in long]
    if examples and not kept:
        raise ValueError(
            f"data.overlong=drop leaves none of the {len(examples)} training examples: every prompt, of student or teacher, is "
            f"too long beside rollout.sampling.max_new_tokens={max_new_tokens}; lower it, or raise the limits of data and "
            "context."
        )
    return kept
