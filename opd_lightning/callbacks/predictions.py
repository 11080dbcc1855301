"""Predictions: the seconds of a run's steps by the cost model, beside the measured ones."""

from collections import Counter, defaultdict, deque
from typing import Any

import torch

from opd_lightning.models.cost_model import Model, Rates, Work, off, predicted

PARTS = ("rollout", "score", "update")
WORTH_SAYING = 10.0
"""Measured seconds from which a run is compared with the prediction."""
KEPT = 1000
"""Steps that are compared, the last ones."""


class Predictions:
    """Work and measured seconds of the steps so far, without the first, in which buffers and caches are made."""

    def __init__(self) -> None:
        self.steps: deque[tuple[Work, dict[str, float]]] = deque(maxlen=KEPT)
        self.before: tuple[Counter[str], defaultdict[str, float]] | None = None

    def add(self, module: Any, samples: list[Any]) -> None:
        """Add a step that has written and learned from these samples."""
        ledger = module.ledger
        if self.before is not None:
            flops, seconds = self.before
            world = module.trainer.world_size
            spent = {part: (n - flops[part]) / world for part, n in ledger.flops.items()}
            # An engine with a copy of the weights has rates of its own.
            copied = getattr(module.generator, "holds_weights", False)
            own = [len(s.completion_ids) for s in samples if s.source == "student" and not copied]
            learned = sum(s.trainable for s in samples) * module.rollout.num_iterations
            logits = sum(teacher.logit_flops(learned) for teacher in module.teachers.values())
            self.steps.append(
                (
                    Work(spent, max(own, default=0), learned, logits),
                    {part: ledger.seconds[part] - seconds[part] for part in PARTS},
                )
            )
        self.before = Counter(ledger.flops), defaultdict(float, ledger.seconds)

    def compare(self, module: Any) -> tuple[dict[str, Any], str | None]:
        """Predicted and measured seconds of the same steps by name, and a sentence where parts differ by more than half.

        Both are empty for runs of less than ten seconds.
        """
        measured = {part: sum(seconds[part] for _, seconds in self.steps) for part in PARTS}
        if sum(measured.values()) < WORTH_SAYING:
            return {}, None
        lm = module.student.lm
        with module.trainer.precision_plugin.train_step_context():
            kind = lm.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lm.dtype
        rates, model = Rates.measure(lm.device, dtype, lm.config), Model.of(lm, module.sizes, dtype)
        total: Counter[str] = Counter()
        for work, _ in self.steps:
            total.update(predicted(work, rates, model))
        found = {"predicted_seconds": dict(total), "measured_seconds": measured}
        return found, sentence(total, measured)


def sentence(predicted: Counter[str], measured: dict[str, float]) -> str | None:
    """The parts' seconds beside the predicted ones, where some differ by more than half; None where none does."""
    apart = off(predicted, measured)
    if not apart:
        return None
    parts = ", ".join(f"{part} {measured[part]:.3g} s ({predicted[part]:.3g})" for part in PARTS if predicted[part])
    ratios = ", ".join(f"{part} took {ratio:.2g} times the prediction" for part, ratio in apart.items())
    return f"seconds (predicted from this machine's rates): {parts}; {ratios}"
