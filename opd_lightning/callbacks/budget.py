"""Budget: ends training at a limit of tokens, FLOPs or seconds, or at a target accuracy."""

from typing import Any

import lightning as L

from opd_lightning.callbacks.evaluation import Evaluation


class Budget(L.Callback):
    """Stops after the rollout that reaches a limit; `trainer.max_steps`, the budget of updates, may stop the run before.

    All costs are recorded in ledger.json and metrics.csv, limited or not.

    Args:
        student_tokens: tokens that the student wrote, over all devices.
        flops: of rollouts, teachers, forward and backward passes, over all devices; see `opd_lightning.models.flops`.
        seconds: of training steps on the first device, evaluation left out; not reproducible.
        accuracy: a target for `metric`. A run that reaches it ends, one that does not before `trainer.max_steps` is censored.
        metric: a number of the evaluation; of the validation split, so that the test split does not decide when a run ends.
        in_a_row: consecutive evaluations that must reach the target.

    Attributes:
        reached: the limit that ended training, such as "budget.flops"; None before.

    Raises:
        ValueError: a limit is not positive.
    """

    def __init__(
        self,
        student_tokens: int | None = None,
        flops: float | None = None,
        seconds: float | None = None,
        accuracy: float | None = None,
        metric: str = "validation/new/accuracy",
        in_a_row: int = 2,
    ):
        self.limits = {"student_tokens": student_tokens, "flops": flops, "seconds": seconds}
        for name, limit in {**self.limits, "accuracy": accuracy, "in_a_row": in_a_row}.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"budget.{name}={limit} must be positive; null sets no limit.")
        if accuracy is not None and accuracy > 1 and metric.endswith("accuracy"):
            raise ValueError(f"budget.accuracy={accuracy} is no share; 0.95 is 95 %.")
        self.accuracy, self.metric, self.in_a_row = accuracy, metric, in_a_row
        self.reached: str | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Check the budget: a resumed run may have reached it already.

        Raises:
            ValueError: there is no such metric.
        """
        last_row = self.history(trainer)[-1]
        if self.accuracy is not None and self.metric not in last_row:
            available = ", ".join(name for name in last_row if name != "step")
            raise ValueError(
                f"budget.metric={self.metric} is no number of this evaluation, which has {available or 'none'}; choose one of "
                "them, or evaluation=study."
            )
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """Stop at a limit. Tokens, FLOPs and accuracy are equal on all devices; seconds are those of the first device."""
        spent = trainer.strategy.broadcast(module.ledger.so_far())
        reached = [name for name, limit in self.limits.items() if limit is not None and spent[name] >= limit]
        if self.accuracy is not None:
            last = [row.get(self.metric, 0.0) for row in self.history(trainer)[-self.in_a_row :]]
            reached += ["accuracy"] if len(last) == self.in_a_row and min(last) >= self.accuracy else []
        if reached:
            trainer.should_stop = True
            self.reached = self.reached or f"budget.{reached[0]}"

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Check once more: the last evaluation may reach the target."""
        if self.reached is None:
            self.on_train_batch_end(trainer, module)

    @staticmethod
    def history(trainer: L.Trainer) -> list[dict[str, float]]:
        """The evaluations so far."""
        return next(c.history for c in trainer.callbacks if isinstance(c, Evaluation))  # type: ignore[attr-defined]
