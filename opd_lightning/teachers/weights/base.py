"""What a weights policy is: which weights a local teacher has, and how they follow the student's."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.flops import Sizes
from opd_lightning.types import Sequences
from opd_lightning.utils.vocabulary import Words


@dataclass(frozen=True)
class Parameters:
    """A student's parameters in numbers: all of them, those in the layers' matrices, those trained, and bytes of each.

    `adapted` says that a fresh adapter is trained and the rest stays.
    """

    all: int
    layers: int
    trained: int
    width: int
    adapted: bool


class Weights:
    """A weights policy, with defaults for what most have in common.

    It is a plain object and no submodule of the trained module: its weights stay out of the optimizer and of DDP and FSDP; what
    it must remember goes into the checkpoint by `state_dict`.

    Attributes:
        self_teacher: do the weights come from the student itself?
        frozen: do they stay what they are? What a frozen teacher wrote can be used again.
        writes: can it write, or only score?
        source: the `Pretrained` they come from; None where that is the student's.
        warning: what a user should know before choosing it, or None.
        words: the ids that it can read, where the student has others; None where it reads all of the student's.
    """

    self_teacher = True
    frozen = False
    writes = True
    source: Pretrained | None = None
    warning: str | None = None
    words: Words | None = None
    student: Student

    def setup(self, student: Student) -> None:
        """Once, on the student's device, before a checkpoint is restored: load or copy."""
        self.student = student

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """Next-token distributions on the trainable tokens of all batches."""
        raise NotImplementedError

    def language_model(self) -> AbstractContextManager:
        """Lends the weights as a language model in eval mode, to write with."""
        raise NotImplementedError

    def sizes(self) -> Sizes:
        """What decides how many FLOPs it takes; the student's."""
        return Sizes.of(self.student.lm)

    def footprint(self, start: Parameters) -> int:
        """Bytes that it will hold beside a student with these parameters, known before anything is loaded."""
        return 0

    def after_update(self) -> None:
        """After each optimizer step; nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot make again; nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
