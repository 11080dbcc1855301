"""Checkpoints at rollout boundaries, written so that a crash leaves the previous one good."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L


class Checkpoint(L.Callback):
    """Replaces checkpoints/last.ckpt every few steps, at the end, and when the run is asked to stop.

    CTRL-C and SIGTERM are honoured after the current step; a second CTRL-C stops at once.

    Args:
        every: optimizer steps between checkpoints.
    """

    def __init__(self, every: int = 50):
        if every < 1:
            raise ValueError(f"callbacks.checkpoint.every={every} must be at least 1.")
        self.every = every
        self.asked: int | None = None
        self.handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Listen for signals; Lightning's own handlers would save in the middle of a step."""
        self.asked = None
        self.listen()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """The step of the checkpoint that there is; and listen again, for Lightning has registered its own meanwhile."""
        self.saved = trainer.global_step
        self.listen()

    def listen(self) -> None:
        """Take signals, and remember who had them first."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers.setdefault(number, signal.signal(number, self._ask))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """Save when it is time or when asked to stop."""
        # One device may have been asked a step before the others; all must stop, and save, at the same one.
        asked = trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False)
        if asked:
            trainer.should_stop = True
            module.stopped_by = module.stopped_by or "signal"
        if asked or trainer.global_step - self.saved >= self.every:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save the last step; the end of training is no place for a signal to interrupt."""
        if trainer.global_step != self.saved:
            self.save(trainer)

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Hand signals back to whoever had them."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def save(self, trainer: L.Trainer) -> None:
        """Write beside the old checkpoint, then replace it in one step."""
        folder = Path(trainer.default_root_dir) / "checkpoints"
        trainer.save_checkpoint(folder / "next.ckpt", weights_only=False)
        if trainer.is_global_zero:
            os.replace(folder / "next.ckpt", folder / "last.ckpt")
        trainer.strategy.barrier()
        self.saved = trainer.global_step
