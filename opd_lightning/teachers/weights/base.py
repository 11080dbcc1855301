"""The base of weights policies: the weights of a local teacher, and how they follow the student's."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.flops import Sizes
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.types import Sequences
from opd_lightning.utils.vocabulary import ValidIds


@dataclass(frozen=True)
class Parameters:
    """A student's parameter counts: all, those in the layers' matrices, those trained; `width` is bytes per parameter.

    `adapted`: only a fresh adapter is trained.
    """

    all: int
    layers: int
    trained: int
    width: int
    adapted: bool


class Weights:
    """A weights policy, with defaults that most policies share.

    It is a plain object and no submodule of the trained module: its weights stay out of the optimizer and of DDP and FSDP; what
    must be restored goes into the checkpoint by `state_dict`.

    Attributes:
        self_teacher: whether the weights come from the student.
        frozen: whether they never change; completions of a frozen teacher can be reused.
        offload: whether they are on the host between scorings.
        writes: whether it can generate completions, not only score them.
        source: the `Pretrained` of the weights; None for the student's.
        warning: a sentence for the user, or None.
        valid_ids: the ids that the weights have, where the student has more; None where they have all of the student's.
        fingerprint: by which a resumed run knows weights again that its checkpoint does not hold; None where there are none.
    """

    self_teacher = True
    frozen = False
    offload = False
    writes = True
    source: Pretrained | None = None
    fingerprint: Fingerprint | None = None
    warning: str | None = None
    valid_ids: ValidIds | None = None
    student: Student

    def setup(self, student: Student) -> None:
        """Load or copy the weights, on the student's device; called once, before a checkpoint is restored."""
        self.student = student

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """Next-token distributions on the trainable tokens of all batches."""
        raise NotImplementedError

    def language_model(self) -> AbstractContextManager:
        """A context with the weights as a language model in eval mode, for generation."""
        raise NotImplementedError

    def sizes(self) -> Sizes:
        """The sizes that FLOPs are counted from; the student's by default."""
        return Sizes.of(self.student.lm)

    def footprint(self, start: Parameters) -> int:
        """Bytes of memory beside a student with these parameters; computed before anything is loaded."""
        return 0

    def after_update(self) -> None:
        """Update the weights after an optimizer step; by default nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The state for the checkpoint; empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
