"""The student as it was when training began."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Student, adapters
from opd_lightning.teachers.weights.base import Parameters, Weights
from opd_lightning.types import Sequences


class FrozenStart(Weights):
    """The student as it was when training began: a copy, or the student without its adapter where that is the same."""

    frozen = True

    def setup(self, student: Student) -> None:
        """Copy the student, unless it is its own start without a fresh adapter.

        A resumed run attaches before its checkpoint is read, so this is the start in any case.
        """
        super().setup(student)
        fresh = adapters.is_fresh(student.lm)
        self.model = None if fresh else copy.deepcopy(student).requires_grad_(False).eval()

    def footprint(self, start: Parameters) -> int:
        """A copy, where switching the adapter off is not enough."""
        return 0 if start.adapted else start.all * start.width

    @contextmanager
    def language_model(self) -> Iterator[PreTrainedModel]:
        """The start."""
        if self.model is not None:
            with self.model.evaluating() as lm:
                yield lm
        else:
            with self.student.evaluating() as lm, adapters.switched_off(lm):
                yield lm

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """The start's distributions."""
        with self.language_model():
            return (self.student if self.model is None else self.model).read(batches)
