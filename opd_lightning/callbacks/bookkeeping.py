"""ledger.json, and rows of earlier attempts dropped from the run's files."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in MiB: resident, and on the GPU if there is one."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = {"resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        peak["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


class Bookkeeping(L.Callback):
    """Writes what the run has cost.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Loggers that keep rows forget those beyond the checkpoint."""
        for logger in trainer.loggers:
            if hasattr(logger, "drop_after"):
                logger.drop_after(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """ledger.json: tokens over all devices, seconds by part, peak memory."""
        if trainer.is_global_zero:
            ledger = module.ledger.state_dict() | {"steps": trainer.global_step, "peak_memory": peak_memory()}
            (self.folder / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n")
