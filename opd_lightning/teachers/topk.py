"""The top-k view of a local teacher: what a server would return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.targets import TopKLogProbs
from opd_lightning.teachers.base import Composite
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.vocabulary import words_of


@dataclass(frozen=True)
class TopKView:
    """Scores of another teacher, cut to the k most probable tokens and the written one when a chunk is asked for.

    Attributes:
        inner: the other teacher's scores, of the whole vocabulary.
        ids [N]: the written tokens.
        k: how many.
    """

    inner: Any
    ids: Tensor
    k: int

    @property
    def vocabulary(self) -> int:
        """The other teacher's."""
        return self.inner.vocabulary

    @property
    def absent(self) -> tuple[int, ...]:
        """The other teacher's."""
        return words_of(self.inner).absent

    @property
    def valid(self) -> Tensor | None:
        """The other teacher's."""
        return self.inner.valid

    @property
    def cost(self) -> Cost:
        """The other teacher's."""
        return self.inner.cost

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """The other teacher's."""
        return self.inner.metrics

    def take(self, index: Tensor | slice) -> "TopKView":
        """The rows at an index of the packed axis."""
        return TopKView(self.inner.take(index), self.ids[index], self.k)

    def chunk(self, rows: slice, out: Tensor | None = None) -> TopKLogProbs:
        """The top k of some rows."""
        full = self.inner.chunk(rows, out).log_probs(1.0)
        ids, logprobs = full.top(self.k)
        written = self.ids[rows]
        known = words_of(self).known(written)  # those that are not are not valid either
        return TopKLogProbs(ids, logprobs, full.of(torch.where(known, written, 0)), full.valid)


class TopKTeacher(Composite):
    """A teacher of which only the k most probable tokens, and the written one, are seen.

    Args:
        teacher: any teacher that provides the whole vocabulary.
        k: tokens.

    Raises:
        ValueError: k is less than 1, or the teacher does not know the whole vocabulary.
    """

    def __init__(self, teacher: Any, k: int):
        super().__init__({"teacher": teacher})
        if k < 1:
            raise ValueError(f"teacher.k={k} must be at least 1.")
        if "full" not in teacher.provides:
            raise ValueError("teacher.teacher gives no whole vocabulary to take the top k of; use it as it is.")
        self.inner, self.top_k, self.provides = teacher, k, frozenset({"topk", "sampled"})

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> TopKView:
        """The other teacher's scores, to be cut."""
        scores = self.inner.score(samples, max_tokens)
        ids = torch.cat([sample.token_ids[sample.loss_mask] for sample in samples])
        return TopKView(scores, ids.to(self.student.lm.device), self.top_k or 1)
