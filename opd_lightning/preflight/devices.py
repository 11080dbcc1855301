"""Devices: GPUs that a run would leave unused, and what other nodes cannot reach."""

import os
import shutil
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from opd_lightning.preflight.results import CheckResult
from opd_lightning.utils.addresses import on_loopback, url_of


def devices(cfg: DictConfig) -> Iterator[CheckResult]:
    """A warning if this machine has a GPU that trainer.accelerator and trainer.devices leave unused; see `nodes`."""
    yield from nodes(cfg)
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


def nodes(cfg: DictConfig) -> Iterator[CheckResult]:
    """A failure if servers that the run starts listen where its other nodes cannot reach them."""
    generator = cfg.get("generator") or {}
    host = str(generator.get("host"))
    if cfg.trainer.get("num_nodes", 1) > 1 and generator.get("start") and on_loopback(url_of(host, 80)):
        yield CheckResult(
            "devices",
            "fail",
            f"generator.start=true starts servers on generator.host={host}, which other nodes do not reach (trainer.num_nodes="
            f"{cfg.trainer.num_nodes}); set the first node's address, or generator.urls=[http://<host>:<port>].",
        )


STARTED = ("WORLD_SIZE", "SLURM_NTASKS", "NODE_RANK", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID")
"""Variables that torchrun, SLURM, MPI, LSF, or users by hand set for a process of several nodes."""


def check_started(cfg: DictConfig) -> None:
    """Raises ValueError if a run of several nodes would wait for processes that nothing starts."""
    if (nodes := cfg.trainer.get("num_nodes", 1)) > 1 and not any(name in os.environ for name in STARTED):
        raise ValueError(
            f"trainer.num_nodes={nodes}, and nothing has started this command on {nodes} nodes; start it with torchrun "
            f"--nnodes {nodes} on each of them, or with srun (docs/nodes.md)."
        )


def count(gpus: int) -> str:
    """Their number in words."""
    return "a GPU" if gpus == 1 else f"{gpus} GPUs"
