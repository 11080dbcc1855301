"""A shuffled teacher: another teacher's targets on the wrong tokens, as a control."""

from collections.abc import Sequence
from typing import Any

import torch

from opd_lightning.data.batching import packed_index
from opd_lightning.teachers.base import Composite
from opd_lightning.types import Sample
from opd_lightning.utils.seeds import derive_seed


class ShuffledTeacher(Composite):
    """Another teacher whose targets are permuted over the tokens of each completion.

    Each completion keeps its targets, and so their entropy and distance on average, but no token keeps what the teacher says of
    it (a completion of one token does). What a method gains with this teacher does not come from the teacher's knowledge.

    Args:
        teacher: a teacher of the whole vocabulary, or of its most probable tokens.
        seed: of the permutations, which follow from it and the completion's tokens alone.

    Raises:
        ValueError: the teacher gives no more than the written token's log-probability.
    """

    def __init__(self, teacher: Any, seed: int = 0):
        super().__init__({"teacher": teacher})
        if not teacher.provides & {"full", "topk"}:
            raise ValueError(
                "teacher.teacher gives the written token's log-probability alone, which cannot move; choose another."
            )
        self.inner, self.seed = teacher, seed
        self.provides = teacher.provides if "full" in teacher.provides else frozenset({"topk"})

    def remade(self, teachers: dict[str, Any]) -> "ShuffledTeacher":
        """The same of another teacher."""
        return ShuffledTeacher(teachers["teacher"], self.seed)

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> Any:
        """The other teacher's scores of the samples, permuted within each."""
        scores = self.inner.score(samples, max_tokens)
        counts = [sample.trainable for sample in samples]
        order = torch.cat([packed_index([b], counts)[self.permutation(sample)] for b, sample in enumerate(samples)])
        return scores.take(order.to(self.student.lm.device))

    def permutation(self, sample: Sample) -> torch.Tensor:
        """A cycle through all trainable tokens of a sample, in random order, so that none stays in its place."""
        n = sample.trainable
        seed = derive_seed("shuffled", self.seed, *sample.token_ids.tolist())
        around = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        moved = torch.empty(n, dtype=torch.long)
        moved[around] = around.roll(1)
        return moved
