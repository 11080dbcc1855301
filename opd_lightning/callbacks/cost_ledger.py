"""ledger.json, and rows of earlier attempts dropped from the run's files."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch

from opd_lightning.utils.atomic_files import replace_text


def forget_peak() -> None:
    """Begin to measure peak memory anew, for runs of one sweep may share a process; only Linux can forget resident memory."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in MiB: resident, and on the GPU if there is one."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    import resource  # there is none on Windows

    peak = {"resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    with suppress(OSError, StopIteration):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        peak["resident_mib"] = int(line.split()[1]) / 2**10
    if torch.cuda.is_available():
        peak["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


class CostLedger(L.Callback):
    """Writes what the run has cost.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.peak: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Before the models are loaded."""
        forget_peak()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Loggers that keep rows forget those beyond the checkpoint."""
        for logger in trainer.loggers:
            if hasattr(logger, "drop_after"):
                logger.drop_after(trainer.global_step)

    def highest(self) -> dict[str, float]:
        """Peak memory of this process and of those that the run went on from."""
        return {name: max(mib, self.peak.get(name, 0.0)) for name, mib in peak_memory().items()}

    @property
    def identity(self) -> str:
        """<hash>/seed-<n>: what the folder's name says of the run in it."""
        return f"{self.folder.parent.name.rsplit('-', maxsplit=1)[-1]}/{self.folder.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.highest(), "run": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the checkpoint is that of another run."""
        if state.get("run", self.identity) != self.identity:
            raise ValueError(
                f"checkpoints/last.ckpt is that of another run ({state['run']} instead of {self.identity}); bring the right "
                "one back, remove it to begin anew, or choose another study.name."
            )
        self.peak = state["peak"]

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """ledger.json: tokens and FLOPs over all devices, seconds by part, peak memory, and what making the teacher had cost.

        That is null where nobody knows it, as for a model from the hub.
        """
        if trainer.is_global_zero:
            ledger: dict[str, Any] = module.ledger.state_dict()
            ledger |= {"steps": trainer.global_step, "peak_memory": self.highest()}
            teacher = module.teachers.get("teacher")
            if teacher is not None:  # a teacher that is the student itself cost nothing beforehand
                made = [0 if part.source is None else part.source.training_flops() for part in teacher.parts]
                ledger["teacher_training"] = None if None in made else sum(made)
            replace_text(self.folder / "ledger.json", json.dumps(ledger, indent=1) + "\n")
