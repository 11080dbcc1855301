"""Checkpoints at rollout boundaries, written so that a crash leaves the previous one good."""

import os
import signal
import zipfile
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from opd_lightning.models import shards
from opd_lightning.utils.interrupts import Interrupted, end_waits, end_waits_when

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals at which a run saves and stops."""


def older_checkpoints(folder: Path) -> list[Path]:
    """Older checkpoints, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), key=lambda path: -step_of(path))


def step_of(path: Path) -> int:
    """The number of updates of an older checkpoint."""
    return int(path.stem.removeprefix("step-"))


def damage(path: Path) -> str | None:
    """The damage of a checkpoint file, as text; None if its checksums match and all of it can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                return f"{broken} is not what was written"
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # a flipped bit can make any of them
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if (broken := shards.damage(content, path.parent)) is not None:
        return broken
    missing = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} - set(content)
    return f"without {', '.join(sorted(missing))}, so of another program" if missing else None


def check_checkpoint(path: Path) -> None:
    """Check that a run can resume from this file.

    Raises:
        ValueError: it is damaged, or of another program; the message has the remedy.
    """
    if (broken := damage(path)) is None:
        return
    intact = next((older for older in older_checkpoints(path.parent) if damage(older) is None), None)
    back = f"go back to an older one (mv {intact} {path})" if intact else "there is no older one (callbacks.checkpoint.keep)"
    raise ValueError(f"{path} is damaged ({broken}); {back}, or remove it to begin the run anew.")


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes to the given path. Lightning's own writes to the system's temporary folder first, which may be small."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """The checkpoint, with the tensors of its shards."""
        return shards.whole(super().load_checkpoint(path, *args, **options), Path(path).parent)


class Checkpoint(L.Callback):
    """Replaces checkpoints/last.ckpt every few steps, at the end, and at a signal.

    CTRL-C, SIGTERM and SIGUSR1 (a cluster's pre-emption) are honoured after the current step, or, on one device and before the
    last evaluation, at once where the step waits for a server; a second one stops at once.

    Args:
        every: optimizer steps between checkpoints.
        keep: how many there are: last.ckpt and keep - 1 older ones, step-<n>.ckpt.

    Attributes:
        stop_signal: the signal that this process received; None without one.
        interrupted: whether training ends because a device received a signal.
        saved: the step of the last checkpoint.
    """

    def __init__(self, every: int = 50, keep: int = 1):
        if every < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoint.every={every} and callbacks.checkpoint.keep={keep} must be at least 1.")
        self.every, self.keep = every, keep
        self.stop_signal: int | None = None
        self.interrupted, self.saved = False, 0
        self.handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Install signal handlers; Lightning's own would save in the middle of a step."""
        self.stop_signal, self.interrupted, self.saved = None, False, 0
        self.install_handlers()
        # Devices save together, and only some of them may wait; the last evaluation is part of the last step.
        end_waits_when(
            lambda: self.stop_signal is not None and trainer.world_size == 1 and trainer.global_step != trainer.max_steps
        )
        trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Note the step of the last checkpoint, and install the handlers again: Lightning has replaced them meanwhile."""
        self.saved = trainer.global_step
        self.install_handlers()

    def install_handlers(self) -> None:
        """Install the handlers, and keep the previous ones."""
        for number in SIGNALS:
            self.handlers.setdefault(number, signal.signal(number, self._on_signal))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = number
        end_waits()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """Save every few steps, and at a signal."""
        # The signal may reach one device a step before the others; all must stop, and save, at the same step.
        stopping = trainer.strategy.reduce_boolean_decision(self.stop_signal is not None, all=False)
        if stopping:
            trainer.should_stop, self.interrupted = True, True
        # The last step is saved when its evaluation is complete (on_train_end): a run that crashes before repeats it.
        due = stopping or trainer.global_step - self.saved >= self.every
        if due and trainer.global_step != trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save the last step; signals do not interrupt this."""
        if trainer.global_step != self.saved:
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Save the last update if a signal ended a wait behind it."""
        if isinstance(exception, Interrupted) and trainer.global_step not in (self.saved, trainer.max_steps):
            self.save(trainer)
        end_waits_when(None)

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Restore the previous handlers; a signal after the last step stays in `stop_signal`."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the handlers of before `setup`; `run` does it after an error, for Lightning puts these back behind it."""
        end_waits_when(None)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def save(self, trainer: L.Trainer) -> None:
        """Write beside the old checkpoint, flush to disk, then replace the old one atomically.

        Loggers are saved first: a checkpoint must not be newer than the run's other files.
        """
        folder = Path(trainer.default_root_dir) / "checkpoints"
        for logger in trainer.loggers:
            logger.save()
        folder.mkdir(exist_ok=True)
        try:
            trainer.save_checkpoint(folder / "next.ckpt", weights_only=False)
        except Exception:
            with suppress(OSError):  # a partial file would keep the disk full
                (folder / "next.ckpt").unlink(missing_ok=True)
                shards.remove_others(folder, [self.saved, *map(step_of, older_checkpoints(folder))])
            raise
        if trainer.is_global_zero:
            with (folder / "next.ckpt").open("rb") as file:
                os.fsync(file.fileno())
            if self.keep > 1 and (folder / "last.ckpt").is_file():
                older = folder / f"step-{self.saved}.ckpt"
                older.unlink(missing_ok=True)
                os.link(folder / "last.ckpt", older)
            os.replace(folder / "next.ckpt", folder / "last.ckpt")
            for path in older_checkpoints(folder)[self.keep - 1 :]:
                path.unlink()
            shards.remove_others(folder, [trainer.global_step, *map(step_of, older_checkpoints(folder))])
        trainer.strategy.barrier()
        self.saved = trainer.global_step
