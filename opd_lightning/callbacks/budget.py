"""Budgets: training ends when it has cost enough, however many steps that takes."""

from typing import Any

import lightning as L


class Budget(L.Callback):
    """Stops after the rollout that reaches the budget; `trainer.max_steps` may stop the run before.

    Args:
        student_tokens: tokens that the student wrote, over all devices; None sets no limit.
    """

    def __init__(self, student_tokens: int | None = None):
        if student_tokens is not None and student_tokens < 1:
            raise ValueError(f"budget.student_tokens={student_tokens} must be at least 1; null sets no limit.")
        self.student_tokens = student_tokens

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """A run that goes on may have reached its budget already."""
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """The ledger counts over all devices, so all stop at the same step."""
        if self.student_tokens is not None and module.ledger.tokens["student_tokens"] >= self.student_tokens:
            trainer.should_stop = True
            module.stopped_by = "budget.student_tokens"
