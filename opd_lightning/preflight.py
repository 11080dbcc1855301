"""Looks at the data with the models' own eyes before anything long begins: what is missing, too long, or seen twice."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd_lightning.data import encode_chat
from opd_lightning.losses import Objective
from opd_lightning.models import Pretrained
from opd_lightning.tasks.base import Example, Messages, Task
from opd_lightning.tasks.splits import key_of, near_duplicates
from opd_lightning.teacher import Scorer
from opd_lightning.types import RolloutPolicy, Tokens


def preflight(
    model: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    rollout: RolloutPolicy,
    objective: Objective,
    scorers: Mapping[str, Scorer],
    suite: Mapping[str, Any],
) -> dict[str, Any]:
    """Make sure that training and evaluation have what they need.

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
    check_objective(objective, model)
    if rollout.reads_references:
        check_references(examples)
    held = list({e.id: e for evaluation in suite.values() for e in evaluation.examples}.values())
    check_disjoint(examples, held)
    longest = rollout.max_new_tokens
    check_lengths("rollout", examples, model, tokenizer, lambda e: e.messages, model.template_options, longest)
    check_lengths("task", held, model, tokenizer, lambda e: e.messages, model.template_options, task.max_new_tokens)
    for scorer in scorers.values():
        reader, context = scorer.weights.source or model, scorer.context
        check_lengths("rollout", examples, reader, tokenizer, context, context.template_options, longest)
    pairs = near_duplicates(examples, held)
    found = {"train": len(examples), "heldout": len(held), "near_duplicates": len(pairs), "digest": digest(examples)}
    found |= getattr(task, "notes", {})
    return found | ({"near_duplicates_first": pairs[:5]} if pairs else {})


def digest(examples: Sequence[Example]) -> str:
    """Of what training reads: a run must not go on with other data under the same name."""
    read = [[e.messages, e.completion, e.demonstration, sorted(e.extra.items())] for e in examples]
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


def check_lengths(
    place: str,
    examples: Sequence[Example],
    model: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    chat: Any,
    template_options: dict,
    max_new_tokens: int,
) -> None:
    """Each example's prompt, as `chat` words it, and the completion behind it fit the model's window."""
    window = model.window()
    if window == sys.maxsize or not examples:
        return
    first: Messages = chat(examples[0])
    # No tokenizer makes more tokens than bytes: only prompts that could be too long are tokenized here.
    wording = len(encode_chat(tokenizer, first, **template_options)) + 64
    for example in examples:
        messages = chat(example)
        if wording * len(messages) + sum(len(m["content"].encode()) for m in messages) + max_new_tokens <= window:
            continue
        tokens = len(encode_chat(tokenizer, messages, **template_options))
        if tokens + max_new_tokens > window:
            raise ValueError(
                f"example {example.id} has a prompt of {tokens} tokens; with {place}.max_new_tokens={max_new_tokens} it "
                f"exceeds the {window} tokens that {model.field}={model.path} reads at once; shorten or remove it, or lower "
                f"{place}.max_new_tokens."
            )
