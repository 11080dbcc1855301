"""The match of two tokenizations of the same completions: spans on packed axes, and the tokens that both vocabularies have."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from opd_lightning.data.alignment import Alignment
from opd_lightning.losses.outcomes import Outcomes
from opd_lightning.utils.vocabulary import ValidIds


@dataclass(frozen=True, eq=False)
class SharedIds:
    """The tokens that two vocabularies share, and those that begin the same text.

    Attributes:
        student_ids, teacher_ids [H]: tokens that are the same bytes in both.
        known: the student's valid ids.
        classes [V], [W]: of the student's and the teacher's tokens, see `data.beginnings`; None if each pair is one of its own.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    known: ValidIds
    classes: tuple[Tensor, Tensor] | None = None

    def outcomes(self, teacher: ValidIds) -> Outcomes:
        """The outcomes on which both are compared, for a teacher with these valid ids."""
        return outcomes_of(self, teacher)


@lru_cache(maxsize=4)
def outcomes_of(shared: SharedIds, teacher: ValidIds) -> Outcomes:
    """See `SharedIds.outcomes`; made once."""
    device, pairs = shared.student_ids.device, (shared.student_ids, shared.teacher_ids)
    sizes = (shared.known.size, teacher.size)
    masks = [ids.contains(torch.arange(ids.size, device=device)) for ids in (shared.known, teacher)]
    classes = alone = [torch.arange(size, device=device) + base for size, base in zip(sizes, (0, sizes[0]), strict=True)]
    if shared.classes is None:
        inside = shared.teacher_ids < sizes[1]
        classes = [alone[0], alone[1].scatter(0, shared.teacher_ids[inside], shared.student_ids[inside])]
    else:  # ids behind a tokenizer's last token are none
        top = max(int(part.max()) for part in shared.classes) + 1
        classes = [
            torch.cat([part[: len(own)], own[len(part) :] + top]) for part, own in zip(shared.classes, alone, strict=True)
        ]
    return Outcomes.of((classes[0], classes[1]), (masks[0], masks[1]), pairs)


@dataclass(frozen=True)
class Match:
    """The spans of several samples, on the packed axes of the student's N and the teacher's M trainable tokens.

    Attributes:
        student_span [N], teacher_span [M]: the span of each token; S spans in all, -1 for a token of none.
        first_student, first_teacher [S]: the first token of each span.
        exact [S]: whether the student's tokens are text.
        faithful [S]: whether the teacher's first token is the bytes that it covers: its distribution is about this text.
        student_ids [N], teacher_ids [M]: the tokens.
        sample [N]: the index of the sample of each of the student's tokens.
        sampler_logprob [N]: log-probability of the student's tokens when they were drawn; None where that is not known.
        vocabulary: of the student.
        shared: the tokens that both have, and those that begin the same text.
    """

    student_span: Tensor
    teacher_span: Tensor
    first_student: Tensor
    first_teacher: Tensor
    exact: Tensor
    faithful: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    sample: Tensor
    sampler_logprob: Tensor | None
    vocabulary: ValidIds
    shared: SharedIds

    @property
    def single(self) -> Tensor:
        """Whether each of the student's tokens [N] is a span of one token of both."""
        return self.of_span((self.per_span(self.student_span) == 1) & (self.per_span(self.teacher_span) == 1))

    def of_span(self, values: Tensor) -> Tensor:
        """Values [N] of the student's tokens from those of spans [S]; 0 or False for a token of none."""
        if not len(values):
            return values.new_zeros(len(self.student_span))
        return torch.where(self.student_span < 0, torch.zeros_like(values[:1]), values[self.student_span.clamp_min(0)])

    def per_span(self, span: Tensor, values: Tensor | None = None) -> Tensor:
        """The sums [S] of values of tokens, or their number."""
        values = torch.ones_like(span) if values is None else values
        inside = span >= 0
        return values.new_zeros(len(self.exact)).index_add(0, span[inside], values[inside])

    def rows(self, valid: Tensor | None) -> Tensor:
        """The teacher's row [N] at the first token of each span; -1 where there is none, or its token is not valid [M]."""
        rows = torch.full_like(self.student_span, -1)
        usable = self.exact & self.faithful
        if valid is not None:
            usable = usable & valid[self.first_teacher]
        rows[self.first_student[usable]] = self.first_teacher[usable]
        return rows

    def metrics(self, valid: Tensor) -> dict[str, Tensor]:
        """Shares of each sample's tokens [B]: with a target, and in spans of one token of both."""
        n = torch.bincount(self.sample).clamp_min(1)
        return {
            name: torch.bincount(self.sample, weights=column.double()).float() / n
            for name, column in (("aligned", valid), ("one_to_one", self.single))
        }


def pack_spans(alignments: Sequence[Alignment], student: Sequence[int], teacher: Sequence[int]) -> dict[str, Tensor]:
    """The columns of a `Match` that say where spans are, from the alignment of each sample.

    Args:
        student, teacher: trainable tokens of each sample.
    """
    spans = [len(alignment.bounds) - 1 for alignment in alignments]
    numbers = np.split(np.arange(sum(spans)), np.cumsum(spans)[:-1])
    columns = {}
    for name, counts in (("student", student), ("teacher", teacher)):
        edges = [getattr(alignment, name) for alignment in alignments]
        before = np.cumsum([0, *counts])[:-1]
        rows = [
            np.append(np.repeat(number, np.diff(edge)), np.full(count - edge[-1], -1))
            for number, edge, count in zip(numbers, edges, counts, strict=True)
        ]
        first = [edge[:-1] + base for edge, base in zip(edges, before, strict=True)]
        columns[f"{name}_span"] = torch.from_numpy(np.concatenate(rows).astype(np.int64))
        columns[f"first_{name}"] = torch.from_numpy(np.concatenate(first).astype(np.int64))
    return columns
