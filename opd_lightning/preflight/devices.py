"""Devices: GPUs that a run would leave unused."""

import shutil
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from opd_lightning.preflight.results import CheckResult


def devices(cfg: DictConfig) -> Iterator[CheckResult]:
    """A warning if this machine has a GPU that trainer.accelerator and trainer.devices leave unused."""
    accelerator, wanted = str(cfg.trainer.accelerator), cfg.trainer.devices
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there and accelerator == "cpu":
        yield CheckResult(
            "devices", "warn", f"trainer.accelerator=cpu leaves {count(there)} unused; trainer.accelerator=auto takes it."
        )
    elif there > 1 and wanted == 1:
        yield CheckResult(
            "devices", "warn", f"trainer.devices=1 uses one of {count(there)}; trainer=ddp trainer.devices={there} uses all."
        )
    elif not there and accelerator == "auto" and shutil.which("nvidia-smi"):
        reason = "is built without CUDA" if torch.version.cuda is None else "sees none (CUDA_VISIBLE_DEVICES, or the driver)"
        yield CheckResult(
            "devices",
            "warn",
            f"this machine seems to have a GPU, and the run uses the CPU: torch {torch.__version__} {reason}; mend that, or "
            "set trainer.accelerator=cpu.",
        )


def count(gpus: int) -> str:
    """Their number in words."""
    return "a GPU" if gpus == 1 else f"{gpus} GPUs"
