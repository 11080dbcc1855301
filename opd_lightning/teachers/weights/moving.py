"""Weights policies without a state: the live student, and a trust region around the start."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Student
from opd_lightning.models.flops import Sizes
from opd_lightning.teachers.weights.base import Parameters, Weights
from opd_lightning.teachers.weights.frozen import FrozenStart
from opd_lightning.types import Sequences


class Live(Weights):
    """The student itself, at its current weights."""

    warning = "teacher=live follows every mistake of its student and may collapse (SDPO's ablation); use it to show just that."

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """The student's current distributions; later updates on the same rollout do not change them."""
        return self.student.read(batches, snapshot=True)

    def language_model(self) -> AbstractContextManager[PreTrainedModel]:
        """The student's language model."""
        return self.student.eval_mode()


class TrustRegion(Weights):
    """An interpolation of start and student: T is proportional to start^(1 - share) x student^share (SDPO, arXiv 2601.20802).

    Args:
        share: weight of the student's logits, in (0, 1).
    """

    writes = False

    def __init__(self, share: float):
        if not 0 < share < 1:
            raise ValueError(f"teacher.share={share} must lie in (0, 1); teacher=frozen is 0, teacher=live is 1.")
        self.share, self.start = share, FrozenStart()

    def setup(self, student: Student) -> None:
        """Keep the start model."""
        super().setup(student)
        self.start.setup(student)
        self.fingerprint = self.start.fingerprint

    def footprint(self, start: Parameters) -> int:
        """Bytes of the start model."""
        return self.start.footprint(start)

    def sizes(self) -> Sizes:
        """The sizes of two models."""
        return super().sizes().times(2)

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """Both models' hidden states side by side; logits are interpolated chunk by chunk."""
        start, current = self.start.read(batches), self.student.read(batches, snapshot=True)
        width = start.hidden.shape[-1]

        def project(hidden: Tensor, out: Tensor | None = None) -> Tensor:
            # A sum, for between -inf and -inf an interpolation is NaN.
            mixed = start.project(hidden[:, :width], out).mul_(1 - self.share)
            return mixed.add_(current.project(hidden[:, width:]), alpha=self.share)

        return HiddenScores(torch.cat([start.hidden, current.hidden], -1), project, start.vocabulary, absent=start.absent)

    def language_model(self) -> AbstractContextManager[PreTrainedModel]:
        """Raises ValueError: the interpolation cannot generate."""
        raise ValueError("teacher=trust_region mixes two models and cannot write; choose teacher=frozen or teacher=ema.")
