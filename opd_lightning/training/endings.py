"""Endings of a run's training before its last update: by a callback, or by a signal."""

import signal
from pathlib import Path
from typing import Any

import lightning as L

from opd_lightning.callbacks import Checkpoint


def stopper(trainer: L.Trainer) -> str | None:
    """What ended training before its last update, such as "callbacks.EarlyStopping"; None if nothing did."""
    if not trainer.should_stop or trainer.global_step == trainer.max_steps:
        return None
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    name = next((name for c in callbacks if (name := getattr(c, "stopped_by", None))), None)
    return f"callbacks.{name}" if name else "callbacks"


class Stopped(KeyboardInterrupt):
    """A run stopped at a signal, after saving; `code` is the exit status that a shell gives to the signal."""

    def __init__(self, sentence: str, number: int | None):
        super().__init__(sentence)
        self.code = 128 + (number or signal.SIGINT)


def stopped(trainer: L.Trainer, folder: Path) -> KeyboardInterrupt:
    """The end of a run that a signal ended within a step."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    saver = next((c for c in callbacks if isinstance(c, Checkpoint) and c.stop_signal is not None), None)
    if saver is None:
        return KeyboardInterrupt()
    return Stopped(f"interrupted; the same command goes on from update {saver.saved}: {folder}", saver.stop_signal)
