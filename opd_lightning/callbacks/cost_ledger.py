"""CostLedger: writes ledger.json, and drops rows beyond a restored checkpoint from the run's files."""

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch

from opd_lightning.callbacks.predictions import Predictions
from opd_lightning.utils.atomic_files import replace_text

log = logging.getLogger(__name__)


def reset_peak_memory() -> None:
    """Reset peak memory, since runs of one sweep may share a process; resident memory can be reset on Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in MiB: resident, and on the GPU if there is one."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    try:
        import resource

        peak = {"resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    except ImportError:  # Windows has none
        memory = psutil.Process().memory_info()
        peak = {"resident_mib": getattr(memory, "peak_wset", memory.rss) / 2**20}
    with suppress(OSError, StopIteration):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        peak["resident_mib"] = int(line.split()[1]) / 2**10
    if torch.cuda.is_available():
        peak["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


class CostLedger(L.Callback):
    """Writes the costs of a run to ledger.json.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.peak: dict[str, float] = {}
        self.predictions = Predictions()

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Reset peak memory before the models are loaded."""
        reset_peak_memory()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Drop logged rows beyond the checkpoint."""
        for logger in trainer.loggers:
            if hasattr(logger, "drop_after"):
                logger.drop_after(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the step to the predictions."""
        self.predictions.add(module, outputs["samples"])

    def overall_peak_memory(self) -> dict[str, float]:
        """Peak memory in MiB, of this process and of earlier ones of the same run."""
        return {name: max(mib, self.peak.get(name, 0.0)) for name, mib in peak_memory().items()}

    @property
    def identity(self) -> str:
        """<hash>/seed-<n> of the run, from its folder's name."""
        return f"{self.folder.parent.name.rsplit('-', maxsplit=1)[-1]}/{self.folder.name}"

    def state_dict(self) -> dict[str, Any]:
        """The run's identity and peak memory, for the checkpoint."""
        return {"peak": self.overall_peak_memory(), "run": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the checkpoint is that of another run."""
        if state.get("run", self.identity) != self.identity:
            raise ValueError(
                f"checkpoints/last.ckpt is that of another run ({state['run']} instead of {self.identity}); bring the right "
                "one back, remove it to begin anew, or choose another study.name."
            )
        self.peak = state["peak"]

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Write ledger.json: tokens and FLOPs over all devices, seconds by part, peak memory, FLOPs of training the teacher.

        The last is null where it is unknown, as for a model from the hub. Predicted seconds stand beside those measured in
        the same steps, the last thousand but for the first, where these took ten seconds or more.
        """
        if trainer.is_global_zero:
            ledger: dict[str, Any] = module.ledger.state_dict()
            ledger |= {"steps": trainer.global_step, "peak_memory": self.overall_peak_memory()}
            teacher = module.teachers.get("teacher")
            if teacher is not None:  # a teacher that is the student itself cost nothing beforehand
                made = [
                    0 if part.source is None else part.source.training_flops()
                    for part in teacher.parts
                    if not part.shares_weights
                ]
                ledger["teacher_training"] = None if None in made else sum(made)
            compared, sentence = self.predictions.compare(module)
            ledger |= compared
            if sentence:
                log.info(sentence)
            replace_text(self.folder / "ledger.json", json.dumps(ledger, indent=1) + "\n")
