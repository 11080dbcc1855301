"""Looks at the data with the models' own eyes before anything long begins: what is missing, too long, or seen twice."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.renderer import encode_chat
from opd_lightning.losses import Objective
from opd_lightning.models import Pretrained
from opd_lightning.tasks.splits import key_of, near_duplicates
from opd_lightning.teachers import Scorer
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, RolloutPolicy, Task, Tokens


def preflight(
    model: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    rollout: RolloutPolicy,
    objective: Objective,
    scorers: Mapping[str, Scorer],
    suite: Mapping[str, Any],
    max_prompt_tokens: int | None = None,
) -> dict[str, Any]:
    """Make sure that training and evaluation have what they need.

    Args:
        max_prompt_tokens: the longest prompt of the student; None is what its window leaves.

    Returns:
        How many examples there are on each side, and how many training prompts nearly repeat a held-out one.

    Raises:
        ValueError: the first thing that is missing, too long or on both sides, and the remedy.
    """
    if not examples:
        raise ValueError("task has no training examples; check task.path and the task's other options.")
    if objective.rewarded and not task.verifies:
        raise ValueError(
            f"task={type(task).__name__} has no verifier, and loss.policy_gradient learns from verdicts alone; give it one "
            "(task/verifier=numeric, say) or choose a method without rewards."
        )
    for name, scorer in scorers.items():
        if scorer.context.needs_siblings and getattr(rollout, "samples", 1) < 2:
            raise ValueError(
                f"rollout.samples_per_prompt=1 leaves a completion without siblings for the {name} to read; choose "
                "rollout=student_group, or context=feedback."
            )
        if scorer.context.reads_attempts and not task.verifies:
            raise ValueError(
                f"task={type(task).__name__} has no verifier, and the context of the {name} takes verdicts; give it one "
                "(task/verifier=numeric, say) or choose context=demonstration."
            )
    check_objective(objective, model)
    if rollout.reads_references:
        check_references(examples)
    held = list({e.id: e for evaluation in suite.values() for e in evaluation.examples}.values())
    check_disjoint(examples, held)
    longest = rollout.max_new_tokens
    plain = NoContext(model.template_options, max_prompt_tokens)
    check_lengths("rollout", examples, model, tokenizer, plain, longest, "data")
    check_lengths("task", held, model, tokenizer, NoContext(model.template_options), task.max_new_tokens, "data")
    check_heard("student", examples[0], tokenizer, plain)
    for name, scorer in scorers.items():
        check_heard(name, examples[0], tokenizer, scorer.context)
        check_lengths("rollout", examples, scorer.weights.source or model, tokenizer, scorer.context, longest, "context")
    pairs = near_duplicates(examples, held)
    found = {"train": len(examples), "heldout": len(held), "near_duplicates": len(pairs), "digest": digest(examples)}
    found |= getattr(task, "notes", {})
    return found | ({"near_duplicates_first": pairs[:5]} if pairs else {})


def digest(examples: Sequence[Example]) -> str:
    """Of what training reads: a run must not go on with other data under the same name."""
    read = [[e.messages, e.completion, e.demonstration, e.solution, sorted(e.extra.items())] for e in examples]
    return hashlib.blake2b(json.dumps(read).encode(), digest_size=8).hexdigest()


def check_objective(objective: Objective, model: Pretrained) -> None:
    """The loss takes a token of this vocabulary; its parts say themselves what they cannot take."""
    zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1)
    logits = {name: torch.zeros(1, model.words()) for name in ("student", *objective.sources)}
    objective(logits, Tokens(zero, zero, one, one))


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


def check_heard(side: str, example: Example, tokenizer: PreTrainedTokenizerBase, context: NoContext) -> None:
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
            same = encode_chat(tokenizer, without, **context.template_options) == encode_chat(
                tokenizer, chat, **context.template_options
            )
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
    model: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
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
    for example, tokens in long_prompts(examples, tokenizer, context, min(window - max_new_tokens, limit or window)):
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


def long_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: NoContext, limit: int
) -> Iterator[tuple[Example, int]]:
    """The examples whose prompt exceeds a limit, and its tokens."""
    options, wording = context.template_options, None
    for example in examples:
        chat = context(example)
        if chat is None:  # it waits for attempts
            continue
        # No tokenizer makes more tokens than bytes: only prompts that could be too long are tokenized here.
        if wording is None:
            wording = len(encode_chat(tokenizer, chat, **options)) + 64
        if wording * len(chat) + sum(len(m["content"].encode()) for m in chat) <= limit:
            continue
        tokens = len(encode_chat(tokenizer, chat, **options))
        if tokens > limit:
            yield example, tokens


def drop_overlong(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
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
        long |= {example.id for example, _ in long_prompts(examples, tokenizer, context, limit)}
    kept = [example for example in examples if example.id not in long]
    if examples and not kept:
        raise ValueError(
            f"data.overlong=drop leaves none of the {len(examples)} training examples: every prompt, of student or teacher, is "
            f"too long beside rollout.max_new_tokens={max_new_tokens}; lower it, or raise the limits of data and context."
        )
    return kept
