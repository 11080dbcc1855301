"""A moving average of the student's weights, or a periodic copy of them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Student, adapters
from opd_lightning.models.sharding import full_tensor
from opd_lightning.teachers.weights.base import Parameters, Weights
from opd_lightning.types import Sequences

log = logging.getLogger(__name__)


class Average(Weights):
    """A moving average of the student: a <- (1 - rate) a + rate student, after every `every`-th optimizer step.

    A rate of 1 copies the student (periodic sync). The average is kept in float32. Of a student with a low-rank
    adapter it is, by `of`, the average of what the adapter adds to each weight ("effective": exact, and as large as the adapted
    layers), or of the factors themselves ("factors": small, and an approximation: the product of averages is not the average of
    products; it starts from the student's own factors, whose product is zero).

    Args:
        rate: in (0, 1]; SDFT uses 0.01 to 0.05 (arXiv 2601.19897), SDPO 0.01 and 0.05 (arXiv 2601.20802).
        every: optimizer steps.
        of: "effective" or "factors"; without an adapter both are the weights.
    """

    def __init__(self, rate: float, every: int = 1, of: str = "effective"):
        if not 0 < rate <= 1:
            raise ValueError(f"teacher.rate={rate} must lie in (0, 1]; 0.02 is usual, and teacher=frozen never moves.")
        if every < 1:
            raise ValueError(f"teacher.every={every} must be at least 1 optimizer step.")
        if of not in ("effective", "factors"):
            raise ValueError(f"teacher.of={of!r} is unknown; choose effective or factors.")
        self.rate, self.every, self.of = rate, every, of
        self.updates = 0

    def setup(self, student: Student) -> None:
        """Start the average at the student's weights."""
        super().setup(student)
        self.dense = self.of == "effective" and bool(adapters.layers(student.lm))
        self.whole: dict[str, Tensor] | None = None
        self.average = {name: self.own(value).clone() for name, value in self.current()}
        if student.sharding is not None:
            student.sharding.gathers.append(self.gathered)
        size = sum(value.nbytes for value in self.average.values()) / 2**20
        log.info(
            f"the teacher's average takes {size:,.0f} MiB ({'effect of the adapter' if self.dense else 'trained weights'})"
        )

    def footprint(self, start: Parameters) -> int:
        """Bytes of the averaged tensors in float32."""
        return 4 * (start.layers if start.adapted and self.of == "effective" else start.trained)

    def current(self) -> Iterator[tuple[str, Tensor]]:
        """The student's current values of the averaged tensors by name, in float32."""
        if self.dense:
            yield from adapters.dense(self.student.lm)
        else:
            yield from ((name, p.detach().float()) for name, p in self.student.named_parameters() if p.requires_grad)

    def own(self, value: Tensor) -> Tensor:
        """This device's part of a value, where weights are spread over several."""
        sharding = self.student.sharding
        return value if sharding is None else sharding.own(value)

    def after_update(self) -> None:
        """Move the average towards the student on every `every`-th step."""
        self.updates += 1
        if self.updates % self.every == 0:
            with self.student.eval_mode() if self.dense else nullcontext():  # factors are multiplied as a whole
                for name, value in self.current():
                    self.average[name].lerp_(self.own(value), self.rate)

    @contextmanager
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        """A context with the whole average on each device; within another one no device waits."""
        if self.whole is not None:
            yield self.whole
            return
        self.whole = {name: full_tensor(value) for name, value in self.average.items()}
        try:
            yield self.whole
        finally:
            self.whole = None

    @contextmanager
    def language_model(self) -> Iterator[PreTrainedModel]:
        """The student with the averages in place of its weights."""
        with self.student.eval_mode() as lm, self.gathered() as average:
            if not self.dense:
                with adapters.substituted(self.student, average):
                    yield lm
            else:
                with adapters.disabled(lm), adapters.added(lm, average):
                    yield lm

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """The average's current distributions; later updates on the same rollout do not change them."""
        with self.language_model():
            return self.student.read(batches, snapshot=True)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average from a checkpoint."""
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(self.own(value))
