"""Automatic precision: what trainer.precision=auto is for a run, decided once and kept where the run goes on."""

from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from opd_lightning.config.aliases import read_run
from opd_lightning.config.precision import EXACT, MIXED, is_auto
from opd_lightning.preflight.narrow import has_bfloat16
from opd_lightning.runs.identity import PRECISION, is_run, predates_auto
from opd_lightning.runs.status import write_status


class Choice(NamedTuple):
    """A precision of the Trainer.

    Attributes:
        precision: its name.
        reason: why `auto` takes it; empty where it was set.
        tentative: whether the first step has yet to confirm it.
    """

    precision: str
    reason: str = ""
    tentative: bool = False


def precision_of(cfg: DictConfig, folder: Path) -> Choice:
    """The precision of the run in a folder: what is set, what a run that goes on began with, or what this machine suggests."""
    if not is_auto(cfg):
        return Choice(str(cfg.trainer.precision))
    if is_run(str(folder)) or predates_auto(folder):
        return Choice(str(read_run(folder)["trainer"]["precision"]), "the run began with it")
    return automatic(cfg)


def automatic(cfg: DictConfig) -> Choice:
    """bf16-mixed where float32 weights are trained on a GPU that multiplies in bfloat16 by itself, else 32-true."""
    dtype = str(cfg.model.get("dtype", "float32"))
    if dtype != "float32":
        return Choice(EXACT, f"model.dtype={dtype} has its own products")
    if not takes_gpu(cfg):
        return Choice(EXACT, "on a CPU, so that a run has the same numbers on every machine")
    if not has_bfloat16(torch.device("cuda")):
        return Choice(EXACT, "this GPU has no bfloat16")
    return Choice(MIXED, "this GPU has bfloat16; before the first update it is compared with float32", tentative=True)


def takes_gpu(cfg: DictConfig) -> bool:
    """Whether the run is on GPUs of CUDA or ROCm."""
    return str(cfg.trainer.accelerator) in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def record(folder: Path, precision: str) -> None:
    """Keep a run's precision in its status.json; one from before `auto` stays without, so that it is found again."""
    if not predates_auto(folder):
        write_status(folder, "running", **{PRECISION: precision})
