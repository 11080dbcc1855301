"""Batches: samples packed over their trainable tokens, split into micro-batches without a change of the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import TeacherScores
from opd_lightning.types import Sample, Sequences, Tokens
from opd_lightning.utils.dtypes import real_dtype


@dataclass(frozen=True)
class Batch:
    """Scored samples: the inputs of the loss, packed over the trainable tokens of all samples.

    Attributes:
        samples: B of them.
        tokens: N tokens, in sample order.
        scores: each teacher's scores of the same N tokens, by name.
        skip_update: no device has a token with a gradient; the step counts and changes no weights.
        active: indices of the samples with a token of non-zero weight, at least one; others get no forward pass.
    """

    samples: list[Sample]
    tokens: Tokens
    scores: dict[str, TeacherScores]
    skip_update: bool
    active: list[int]

    def micro(self, rows: Sequence[int], pad_id: int) -> tuple[Sequences, Tokens, dict[str, TeacherScores]]:
        """The samples in `rows`, as inputs of the student's forward pass."""
        device = self.tokens.ids.device
        index = packed_index(rows, [sample.trainable for sample in self.samples]).to(device)
        sequences = collate([self.samples[b] for b in rows], pad_id, device)
        return sequences, self.tokens.take(index), {name: score.take(index) for name, score in self.scores.items()}

    def describe(self, texts: Sequence[str]) -> dict[str, Any]:
        """The batch for inspection, as plain values and tensors on the host."""
        tokens = self.tokens
        columns = {"token_ids": tokens.ids, "weight": tokens.weight, "advantage": tokens.advantage}
        return {
            "examples": [sample.example.id for sample in self.samples],
            "prompt_ids": [sample.token_ids[: sample.prompt_length].tolist() for sample in self.samples],
            "texts": list(texts),
            "lengths": torch.tensor([sample.trainable for sample in self.samples]),
            **{name: None if column is None else column.cpu() for name, column in columns.items()},
        }


def pack(samples: Sequence[Sample], device: torch.device) -> Tokens:
    """The trainable tokens of samples; weight is 1, or 0 where a sample is left out of the loss."""
    counts = torch.tensor([sample.trainable for sample in samples])
    has_logprobs = [sample.logprobs is not None for sample in samples]
    columns = {
        "ids": torch.cat([sample.token_ids[sample.loss_mask] for sample in samples]),
        "position": torch.cat([torch.arange(n) for n in counts.tolist()]),
        "weight": torch.repeat_interleave(
            torch.tensor([float(sample.include_in_loss) for sample in samples], dtype=real_dtype()), counts
        ),
        "sample": torch.repeat_interleave(torch.arange(len(samples)), counts),
        "group": torch.repeat_interleave(torch.tensor([sample.group for sample in samples]), counts),
    }
    if all(has_logprobs):
        columns["sampler_logprob"] = torch.cat([s.logprobs[s.loss_mask] for s in samples if s.logprobs is not None])
    return Tokens(**{name: column.to(device) for name, column in columns.items()})  # type: ignore[arg-type]


def collate(
    samples: Sequence[Sample], pad_id: int, device: torch.device, prompts: Sequence[Sequence[int]] | None = None
) -> Sequences:
    """Samples as right-padded rows, without a gap behind the prompt: student and teacher prompts may differ.

    Args:
        pad_id: fills the right side; it is masked and may equal the end token.
        prompts: B lists of at least one token each, in place of the samples' own.
    """
    rows, columns = [], []
    for b, sample in enumerate(samples):
        own = prompts is None
        prompt = sample.token_ids[: sample.prompt_length] if own else torch.tensor(prompts[b], dtype=torch.long)  # type: ignore[index]
        assert len(prompt) > 0, "a prompt needs at least one token to predict the first completion token from"
        rows.append(torch.cat([prompt, sample.token_ids[sample.prompt_length :]]))
        columns.append(sample.loss_mask.nonzero().squeeze(1) + (len(prompt) - sample.prompt_length - 1))
    totals = torch.tensor([len(row) for row in rows])
    input_ids = torch.full((len(rows), int(totals.max())), pad_id, dtype=torch.long)
    for b, row in enumerate(rows):
        input_ids[b, : len(row)] = row
    attention_mask = (torch.arange(int(totals.max())) < totals[:, None]).long()
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(c) for c in columns]))
    return Sequences(*(x.to(device) for x in (input_ids, attention_mask, row, torch.cat(columns))))


def plan_micro_batches(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` padded tokens, longest rows first.

    Args:
        lengths: tokens per row, prompt and completion together.
        budget: upper bound of rows x longest row, in tokens; None keeps the batch together. A row longer than the budget is
            a micro-batch of its own.

    Returns:
        Lists of row indices; each row appears once.
    """
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    if budget is None:
        return [order]
    batches: list[list[int]] = []
    for b in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(b)
        else:
            batches.append([b])
    return batches


def packed_index(rows: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Positions on the packed axis of the tokens of `rows`, in their order.

    Args:
        counts: trainable tokens of each sample of the full batch, which is packed in sample order.
    """
    stops = torch.tensor(list(counts)).cumsum(0).tolist()
    return torch.cat([torch.arange(stops[b] - counts[b], stops[b]) for b in rows])
