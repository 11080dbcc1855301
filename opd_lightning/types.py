"""The data that flows through the walk: prompts -> rollout -> score -> loss -> update.

Axis letters, here and everywhere: B sequences (prompts x samples per prompt), T completion tokens, L prompt and
completion tokens together, N completion tokens of several sequences packed on one axis, V vocabulary, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.batching import packed_index
from opd_lightning.utils.metrics import StepMetrics

Messages = list[dict[str, str]]
"""A chat as transformers' chat templates take it: [{"role": "user", "content": "..."}, ...]."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task and what is known about its answer.

    Attributes:
        id: unique within the task, stable across runs.
        messages: the chat shown to the student.
        completion: the reference answer that SFT imitates, or None.
        demonstration: an expert's answer that a teacher may be shown, or None.
        solution: a reference solution that a teacher may be shown, or None.
        skill: the name under which evaluation groups this example, such as "new" or "prior/sort".
        extra: whatever the task's own verifier needs.
    """

    id: str
    messages: Messages
    completion: str | None = None
    demonstration: str | None = None
    solution: str | None = None
    skill: str = "new"
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion; each score lies in [0, 1].

    Attributes:
        content: is the answer right, however it is written? This is the reward.
        format: is it written as the task asks? Scored apart, never rewarded; None where the task asks for no format.
        feedback: what the environment says of it, such as a failed test; None where it says nothing.
    """

    content: float
    format: float | None = None
    feedback: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A completion of the student's and its verdict."""

    text: str
    verdict: Verdict


class Task(Protocol):
    """What a task offers. Splits are "train", "validation" and "test", disjoint by construction.

    Attributes:
        verifies: do verdicts mean anything? False refuses objectives that learn from rewards.
        max_new_tokens: how long a useful answer can be; the default of rollouts and evaluations.
        batch_size: prompts per rollout that suit it; the default of data.batch_size.
        contexts: how each option of `conf/context` is worded for it; read by the configuration, not by the program.

    A task may also have `partial_scores` (True: a content below 1 is not right, and the mean score is reported beside the
    accuracy) and `notes` (numbers about its data, for status.json).
    """

    verifies: bool
    max_new_tokens: int
    batch_size: int
    contexts: Mapping[str, Any]

    def examples(self, split: str) -> Sequence[Example]:
        """The examples that methods train on ("train") or are measured on (the others)."""
        ...

    def verify(self, example: Example, completion: str) -> Verdict:
        """Judge a completion (text without special tokens); must not raise on any text."""
        ...


class Prompts:
    """A batch of prompts: what the student reads before it writes.

    A plain class, because Lightning copies dataclasses field by field on their way to the device.

    Attributes:
        examples: one per prompt.
        ids: the student's prompt token ids, one list per prompt, without padding.
    """

    def __init__(self, examples: list[Example], ids: list[list[int]]):
        self.examples, self.ids = examples, ids

    def repeat(self, samples: int) -> "Prompts":
        """Each prompt `samples` times in a row, so that row b belongs to prompt b // samples."""
        return Prompts(
            [example for example in self.examples for _ in range(samples)], [ids for ids in self.ids for _ in range(samples)]
        )


@dataclass(frozen=True)
class Rollout:
    """Completions and where they came from.

    Attributes:
        prompts: B prompts, repeated when a prompt was sampled several times.
        ids [B, T]: completion token ids, right-padded; the closing EOS is part of the completion.
        lengths [B]: completion tokens per row. The mask follows from these, never from the pad id.
        truncated [B]: True where the completion ran into the token limit before EOS.
        counts [B]: False on completions that are left out of the loss.
        samples: completions per prompt; rows of one prompt are adjacent.
        logprobs [B, T]: log-probability of each token under the student's sampling distribution, or None.
        writers: who wrote each completion: "student", "teacher" or "dataset".
        teacher_tokens, teacher_flops: what passed through the teacher for it to write; 0 where it only scores.
    """

    prompts: Prompts
    ids: Tensor
    lengths: Tensor
    truncated: Tensor
    counts: Tensor
    writers: list[str]
    samples: int = 1
    logprobs: Tensor | None = None
    teacher_tokens: int = 0
    teacher_flops: int = 0

    @property
    def mask(self) -> Tensor:
        """[B, T], True on completion tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The B completions as text without special tokens."""
        rows = zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        return tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)

    def describe(self, metrics: StepMetrics) -> None:
        """Add what is worth knowing of these completions to a step's metrics."""
        metrics.mean("rollout/length", self.lengths)
        metrics.mean("rollout/truncated", self.truncated)
        metrics.total("prompt_tokens", self.lengths.new_tensor(sum(map(len, self.prompts.ids))))
        metrics.total("completion_tokens", self.lengths)
        own = torch.tensor([writer == "student" for writer in self.writers], device=self.lengths.device)
        metrics.total("student_tokens", self.lengths * own)
        metrics.total("teacher_tokens", self.lengths.new_tensor(self.teacher_tokens))


class RolloutPolicy(Protocol):
    """Who writes the completions; see `opd_lightning.rollout`.

    Attributes:
        on_policy: are all completions samples of the student itself?
        student_writes: are some of them?
        reads_references: does it need a reference completion for each example?
        sources: names of the scorers it asks, such as "teacher".
        updates_per_rollout: optimizer steps taken on one rollout.
        max_new_tokens: the longest completion there can be.
    """

    on_policy: bool
    student_writes: bool
    reads_references: bool
    sources: frozenset[str]
    updates_per_rollout: int
    max_new_tokens: int

    def __call__(self, student: Any, prompts: Prompts, seed: int, scorers: Mapping[str, Any]) -> Rollout:
        """One completion per prompt and sample."""
        ...


@dataclass(frozen=True)
class Tokens:
    """What losses may know about each completion token; every tensor has the packed axis N, or is None.

    Attributes:
        ids: the token.
        position: its index within its completion, from 0.
        weight: its share of the batch loss: the loss is the sum of weight x per-token loss.
        advantage: its advantage, for policy-gradient terms.
        old_logprob: its log-probability before the first update on this rollout; None on the first (the ratio is 1).
        sampler_logprob: its log-probability under the distribution it was drawn from, if that is known.
        told: False where the teacher was told nothing and its distribution means nothing; None where it always was.
    """

    ids: Tensor
    position: Tensor
    weight: Tensor
    advantage: Tensor | None = None
    old_logprob: Tensor | None = None
    sampler_logprob: Tensor | None = None
    told: Tensor | None = None

    def scaled(self, factor: float) -> "Tokens":
        """The same tokens with their weights multiplied."""
        return replace(self, weight=self.weight * factor)

    def take(self, index: Tensor | slice) -> "Tokens":
        """The tokens at an index of the packed axis."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[index] for name, value in columns.items() if value is not None})


@dataclass(frozen=True)
class LogitSource:
    """A next-token distribution per completion token, kept as hidden states until a chunk of logits is needed.

    Attributes:
        hidden [N, H]: the hidden state that predicts each token; no gradient flows into it.
        project: maps hidden rows [n, H] to logits [n, V], into a buffer of that size if one is given.
        vocabulary: V.
    """

    hidden: Tensor
    project: Callable[..., Tensor]
    vocabulary: int

    def take(self, index: Tensor | slice) -> "LogitSource":
        """The rows at an index of the packed axis."""
        return LogitSource(self.hidden[index], self.project, self.vocabulary)


@dataclass(frozen=True)
class Sequences:
    """Prompt and completion joined, right-padded, ready for one forward pass.

    Attributes:
        input_ids [B, L], attention_mask [B, L].
        row [N], column [N]: where the hidden state that predicts each completion token stands.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class Batch:
    """A scored rollout: everything the loss needs, packed over the completion tokens of all rows.

    Attributes:
        rollout: the completions.
        tokens: N tokens, in row order.
        sources: other distributions on the same N tokens, by name.
        silent: no device has a token with a gradient; the step is counted and moves nothing.
        rows: those with a token that counts, at least one; the others are not even read.
    """

    rollout: Rollout
    tokens: Tokens
    sources: dict[str, LogitSource]
    silent: bool
    rows: list[int]

    def micro(self, rows: Sequence[int], pad_id: int) -> tuple[Sequences, Tokens, dict[str, LogitSource]]:
        """The part of the batch in `rows`, as the student's forward pass takes it."""
        prompts, lengths = self.rollout.prompts.ids, self.rollout.lengths
        index = packed_index(rows, lengths)
        picked = list(rows)
        sequences = join([prompts[b] for b in rows], self.rollout.ids[picked], lengths[picked], pad_id)
        return sequences, self.tokens.take(index), {name: s.take(index) for name, s in self.sources.items()}

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What a person needs to see what was in it, as plain values and tensors on the host."""
        rollout, tokens = self.rollout, self.tokens
        columns = {"token_ids": tokens.ids, "weight": tokens.weight, "advantage": tokens.advantage}
        return {
            "examples": [e.id for e in rollout.prompts.examples],
            "prompt_ids": rollout.prompts.ids,
            "texts": rollout.texts(tokenizer),
            "lengths": rollout.lengths.cpu(),
            **{name: None if column is None else column.cpu() for name, column in columns.items()},
        }


def join(prompt_ids: Sequence[Sequence[int]], ids: Tensor, lengths: Tensor, pad_id: int) -> Sequences:
    """Put each completion behind its prompt without a gap: student and teacher prompts may differ, `ids` are the same.

    Args:
        prompt_ids: B lists of at least one token each.
        ids [B, T], lengths [B]: the completions.
        pad_id: fills the right side; it is masked and may equal EOS.
    """
    totals = [len(p) + int(n) for p, n in zip(prompt_ids, lengths, strict=True)]
    input_ids = torch.full((len(totals), max(totals)), pad_id, dtype=torch.long)
    completions, host_lengths = ids.cpu(), lengths.tolist()
    for b, prompt in enumerate(prompt_ids):
        assert len(prompt) > 0, "a prompt needs at least one token to predict the first completion token from"
        input_ids[b, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        input_ids[b, len(prompt) : totals[b]] = completions[b, : host_lengths[b]]
    attention_mask = (torch.arange(max(totals)) < torch.tensor(totals)[:, None]).long()
    row = torch.repeat_interleave(torch.arange(len(totals)), lengths.cpu())
    column = torch.cat([torch.arange(len(p) - 1, t - 1) for p, t in zip(prompt_ids, totals, strict=True)])
    device = ids.device
    return Sequences(input_ids.to(device), attention_mask.to(device), row.to(device), column.to(device))
