"""The student's weights at the start of training."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Frozen, Student, adapters
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.teachers.weights.base import Parameters, Weights
from opd_lightning.types import Sequences


class FrozenStart(Weights):
    """The student's weights at the start of training: a copy, or the student without its adapter where that is the same.

    Args:
        offload: whether a copy is on the host between scorings.
    """

    frozen = True

    def __init__(self, offload: bool = False):
        self.offload = offload

    def setup(self, student: Student) -> None:
        """Copy the student, unless disabling its fresh adapter restores the start.

        A resumed run attaches before its checkpoint is read, so this is the start in any case.
        """
        super().setup(student)
        self.model: Frozen | None = None
        if not adapters.is_fresh(student.lm):
            device = student.lm.device
            lm = copy.deepcopy(student.lm)
            self.model = Frozen(lm, student.chunk, student.valid_ids, device, student.sharding, self.offload)
        self.fingerprint = Fingerprint.of("model.path", student)

    def footprint(self, start: Parameters) -> int:
        """Bytes of the copy; 0 where the student has an adapter."""
        return 0 if start.adapted else start.all * start.width

    @contextmanager
    def language_model(self) -> Iterator[PreTrainedModel]:
        """The model at the start of training."""
        if self.model is not None:
            with self.model.eval_mode() as lm:
                yield lm
        else:
            with self.student.eval_mode() as lm, adapters.disabled(lm):
                yield lm

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """The distributions of the start model."""
        with self.language_model():
            return (self.student if self.model is None else self.model).read(batches)
