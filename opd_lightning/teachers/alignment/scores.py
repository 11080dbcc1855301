"""Scores of a teacher with another tokenizer at the student's tokens, chunk by chunk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.aligned_targets import CoarseLogits, CoarseTopK, SortedLogits
from opd_lightning.losses.closed_form import Scratch
from opd_lightning.losses.head import widen
from opd_lightning.losses.targets import TopKLogProbs
from opd_lightning.teachers.alignment.match import SharedIds
from opd_lightning.types import Cost
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of

ENTRIES = 2**24
"""Logits that exist at a time where sampled tokens are read off them."""


@dataclass(frozen=True)
class AlignedScores:
    """A teacher's scores of its own tokens, at the student's tokens that begin where one of them begins.

    Attributes:
        inner: the teacher's scores of M tokens.
        row [N]: the row of them for each of the student's tokens; -1 where there is none.
        target: makes of a teacher's target of n rows, and whether each is valid, the student's.
        vocabulary, absent: the student's.
    """

    inner: Any
    row: Tensor
    target: Callable[[Any, Tensor], Any]
    vocabulary: int
    absent: tuple[int, ...] = ()
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def valid(self) -> Tensor:
        """Whether each token [N] has a target."""
        return self.row >= 0

    @property
    def cost(self) -> Cost:
        """The teacher's cost."""
        return self.inner.cost

    def take(self, index: Tensor | slice) -> "AlignedScores":
        """The rows at an index of the packed axis."""
        return replace(self, row=self.row[index])

    def chunk(self, rows: slice, out: Tensor | None = None) -> Any:
        """The target of the rows; the teacher's logits have a buffer of their own, for they are not as wide as `out`."""
        row = self.row[rows]
        valid = row >= 0
        buffer = self.scratch.like("teacher", torch.empty(len(row), 0, device=row.device), self.inner.vocabulary)
        return self.target(self.inner.take(row.clamp_min(0)).chunk(slice(None), buffer), valid)


@dataclass(frozen=True)
class OnShared:
    """Targets on the outcomes of both: of the teacher's logits, or of its top k."""

    shared: SharedIds
    teacher: ValidIds

    def __call__(self, target: Any, valid: Tensor) -> Any:
        """The target for the student, valid [n]."""
        outcomes = self.shared.outcomes(self.teacher)
        if not isinstance(target, TopKLogProbs):
            return CoarseLogits(target.logits, outcomes, valid)
        size, known = len(outcomes.teacher), target.named & self.teacher.contains(target.ids)
        ids = torch.where(known, outcomes.teacher.outcome[torch.where(known, target.ids, 0)], size)
        both = torch.zeros_like(outcomes.teacher.outcome, dtype=torch.bool)
        both[outcomes.teacher.first[outcomes.shared]] = True
        other = ~(known & both[torch.where(known, target.ids, 0)])
        mass = target.logprobs.exp().masked_fill(~other, 0.0).sum(-1)
        return CoarseTopK(ids, target.logprobs, outcomes, valid, torch.log1p(-mass.clamp(max=1 - 1e-6)))


def by_rank(target: Any, valid: Tensor) -> SortedLogits:
    """The target of the teacher's sorted probabilities, valid [n]."""
    return SortedLogits(target.logits, valid)


@torch.no_grad()
def sampled_logprobs(inner: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of the tokens ids [M] by a teacher's scores of them, and whether [M] it has them."""
    step = max(1, ENTRIES // inner.vocabulary)
    covered = valid_ids_of(inner).contains(ids)
    parts = [torch.zeros(0, device=ids.device)]
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        target = inner.chunk(rows).log_probs(1.0)
        parts.append(widen(target.of(torch.where(covered[rows], ids[rows], 0))))
    if inner.valid is not None:
        covered = covered & inner.valid
    return torch.cat(parts).masked_fill(~covered, 0.0), covered
