"""Checks of the data before anything long begins: what is missing, too long, or on both sides of a split."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.losses.targets import FullLogits, SampledLogProbs, TopKLogProbs
from opd_lightning.models import Pretrained
from opd_lightning.preflight.rendering import unreadable
from opd_lightning.tasks.splits import key_of, near_duplicates
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, Tokens


def preflight(parts: Any) -> dict[str, Any]:
    """Make sure that training and evaluation have what they need.

    Args:
        parts: the run's `Components`.

    Returns:
        How many examples there are on each side, and how many training prompts nearly repeat a held-out one.

    Raises:
        ValueError: the first thing that is missing, too long or on both sides, and the remedy.
    """
    examples, task, rollout, objective = parts.examples, parts.task, parts.rollout, parts.objective
    if not examples:
        raise ValueError("task has no training examples; check task.path and the task's other options.")
    if objective.rewarded and not task.verifies:
        raise ValueError(
            f"task={type(task).__name__} has no verifier, and loss.policy_gradient learns from verdicts alone; give it one "
            "(task/verifier=numeric, say) or choose a method without rewards."
        )
    check_contexts(parts)
    check_objective(parts)
    if rollout.reads_references:
        check_references(examples)
    held = list({e.id: e for evaluation in parts.suite.values() for e in evaluation.examples}.values())
    check_disjoint(examples, held)
    if refused := unreadable(held, parts.renderer, {"student": NoContext(parts.model.template_options)}):
        raise ValueError(next(iter(refused.values())))
    for teacher in parts.teachers.values():
        teacher.check_examples(examples)
    longest = rollout.sampling.max_new_tokens
    readers = parts.readers()
    model, context = readers["student"]
    check_lengths("rollout", examples, parts.renderer, model, context, longest, "data")
    plain = NoContext(parts.model.template_options)
    check_lengths("task", held, parts.renderer, parts.model, plain, task.max_new_tokens, "data")
    for name, (model, context) in readers.items():
        check_heard(name, examples[0], parts.renderer, context)
        if name != "student":
            check_lengths("rollout", examples, parts.renderer, model, context, longest, "context")
    pairs = near_duplicates(examples, held)
    found = {"train": len(examples), "heldout": len(held), "near_duplicates": len(pairs), "digest": digest(examples)}
    found |= getattr(task, "notes", {})
    return found | ({"near_duplicates_first": pairs[:5]} if pairs else {})


def check_contexts(parts: Any) -> None:
    """Contexts that take attempts have a verifier, and those that take siblings have siblings."""
    for name, part in all_parts(parts.teachers):
        if part.context.needs_siblings and parts.rollout.sampling.n < 2:
            raise ValueError(
                f"rollout.num_generations=1 leaves a completion without siblings for the {name} to read; choose "
                "rollout=student_group, or context=feedback."
            )
        if part.context.reads_attempts and not parts.task.verifies:
            raise ValueError(
                f"task={type(parts.task).__name__} has no verifier, and the context of the {name} takes verdicts; give it one "
                "(task/verifier=numeric, say) or choose context=demonstration."
            )


def digest(examples: Sequence[Example]) -> str:
    """Of what training reads: a run must not go on with other data under the same name."""
    read = [[e.messages, e.completion, e.demonstration, e.solution, sorted(e.extra.items())] for e in examples]
    return hashlib.blake2b(json.dumps(read).encode(), digest_size=8).hexdigest()


def check_objective(parts: Any) -> None:
    """The loss takes a token of this vocabulary and what the teachers give; its parts say themselves what they cannot take.

    Raises:
        ValueError: they cannot.
    """
    zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1)
    logits = torch.zeros(1, parts.model.words())
    k = torch.arange(min(parts.model.words(), 1024))[None]
    kinds = {
        "full": FullLogits(logits),
        "topk": TopKLogProbs(k, torch.full(k.shape, -10.0), -one),
        "sampled": SampledLogProbs(-one),
    }
    given = {name: parts.teachers[name].provides for name in parts.objective.teachers}
    targets: dict[str, Any] = {name: kinds[next(kind for kind in kinds if kind in can)] for name, can in given.items()}
    try:
        parts.objective(logits, targets, Tokens(zero, zero, one, zero, one, one))
    except AttributeError as error:
        raise ValueError(
            f"loss: a part of it reads more of a teacher than that gives ({error}); choose another loss/gate, or "
            "a teacher of the whole vocabulary."
        ) from error


def check_references(examples: Sequence[Example]) -> None:
    """Every training example has a reference completion."""
    missing = [e.id for e in examples if e.completion is None]
    if missing:
        raise ValueError(
            f"rollout imitates reference completions, and {len(missing)} of {len(examples)} training examples have none, "
            f"example {missing[0]} first; map them (task.columns.completion=<column>), or choose a method whose student or "
            "teacher writes."
        )


def check_disjoint(examples: Sequence[Example], held: Sequence[Example]) -> None:
    """No held-out prompt is a training prompt."""
    trained = {key_of(e): e.id for e in examples}
    both = [(trained[key_of(e)], e.id) for e in held if key_of(e) in trained]
    if both:
        raise ValueError(
            f"task: {len(both)} held-out prompts are training prompts too (training example {both[0][0]} is held-out "
            f"{both[0][1]}), so the evaluation would measure memory; remove them from one side."
        )


def check_heard(side: str, example: Example, renderer: ChatRenderer, context: NoContext) -> None:
    """System turns, and turns that the context adds, are in the prompt: some chat templates leave out what they do not know.

    Args:
        side: whose prompt it is, for the error.

    Raises:
        ValueError: a turn is left out.
    """
    chat = context(example) or []
    for i, turn in enumerate(chat):
        if turn["role"] != "system" and turn in example.messages:
            continue
        without = [*chat[:i], *chat[i + 1 :]]
        try:
            words = renderer.with_options(context.template_options)
            same = words.render(without) == words.render(chat)
        except ValueError:  # a template that minds the missing turn has seen it
            continue
        if same:
            raise ValueError(
                f"the {side}'s prompt of example {example.id} lacks its {turn['role']} turn {turn['content'][:40]!r}: the chat "
                "template leaves it out. Give model.chat_template=<file>, or word it in the question."
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
    """Each example's prompt, as `context` words it, keeps to its limit, and the completion behind it to the model's window.

    Args:
        place: of max_new_tokens in the configuration.
        side: of max_prompt_tokens in the configuration: "data" for the student, "context" for a teacher.
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
    """Of a turn's content, and of what else a template may write of it, such as calls of tools, with its indentation."""
    beside = sum(len(str(value).encode()) for key, value in turn.items() if key not in ("role", "content"))
    return len(turn["content"].encode()) + 4 * beside


def long_prompts(
    examples: Sequence[Example], renderer: ChatRenderer, context: NoContext, limit: int
) -> Iterator[tuple[Example, int]]:
    """The examples whose prompt exceeds a limit, and its tokens."""
    words, longest_wording = renderer.with_options(context.template_options), None
    for example in examples:
        chat = context(example)
        if chat is None:  # it waits for attempts
            continue
        # No tokenizer makes more tokens than bytes: only prompts that could be too long are tokenized here.
        if longest_wording is None:
            longest_wording = len(words.render(chat).token_ids) + 64
        if longest_wording * len(chat) + sum(bytes_of(m) for m in chat) <= limit:
            continue
        tokens = len(words.render(chat).token_ids)
        if tokens > limit:
            yield example, tokens


def drop_overlong(
    examples: Sequence[Example],
    renderer: ChatRenderer,
    readers: Sequence[tuple[Pretrained, NoContext]],
    max_new_tokens: int,
) -> list[Example]:
    """The examples whose prompts fit all readers' limits and windows.

    Raises:
        ValueError: there are none.
    """
    long: set[str] = set()
    for model, context in readers:
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
