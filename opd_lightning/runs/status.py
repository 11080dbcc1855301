"""Status: reads and writes status.json, the state of a run."""

import json
import logging
import os
import platform
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opd_lightning.config.labels import run_label
from opd_lightning.config.trainer_arguments import epochs_of, last_update
from opd_lightning.runs.identity import run_folder
from opd_lightning.utils.atomic_files import read_object, replace_text
from opd_lightning.utils.secrets import redact_secrets

log = logging.getLogger(__name__)


def is_finished(folder: Path, max_steps: int) -> bool:
    """Whether a run is finished, by max_steps or by its budget."""
    status = read_status(folder)
    by_budget = status.get("state") == "finished" and status.get("ended_by", "").startswith("budget.")
    return by_budget or steps_of(folder) >= max_steps > 0


def horizon(cfg: DictConfig, folder: Path) -> int:
    """The update that ends a run; -1 where a budget does, or the number of its examples is not known yet.

    A run that a callback has ended, such as early stopping, is at its end while the configuration has that callback.
    """
    status = read_status(folder)
    known, (place, _, stopper) = status.get("data", {}).get("train", 0), status.get("ended_by", "").partition(".")
    chosen = {str(node["_target_"]).rpartition(".")[2] for node in cfg.callbacks.values() if node is not None}
    if place == "callbacks" and (stopper in chosen or not stopper):
        return steps_of(folder)
    if epochs_of(cfg.trainer) is None or known:
        return last_update(cfg.trainer, known, cfg.data.batch_size, cfg.rollout.num_iterations)
    return -1


def steps_of(folder: Path) -> int:
    """Updates of the finished run in this folder; 0 where there is none."""
    status = read_status(folder)
    return status["step"] if status.get("state") == "finished" else 0


def read_status(folder: Path) -> dict[str, Any]:
    """status.json, or an empty dict if it cannot be read; such a run is made again, or resumed."""
    status = read_object(folder / "status.json")
    types = {"state": str, "step": int, "ended_by": str, "data": dict, "reason": str}
    valid = all(isinstance(status[key], kind) for key, kind in types.items() if key in status)
    finished = {"state", "step", "ended_by"} if status.get("state") == "finished" else {"state"}
    return status if valid and finished <= set(status) and "digest" in status.get("data", {"digest": ""}) else {}


def started(folder: Path | None) -> datetime:
    """When the run in this folder began; now without one. Chat templates that write a date take it from here."""
    try:
        return datetime.fromisoformat(read_status(folder)["started"] if folder is not None else "")
    except (KeyError, TypeError, ValueError):
        return datetime.now().replace(microsecond=0)


def is_worker() -> bool:
    """Whether this process is not the first of a run on several devices; works before a Trainer exists.

    torchrun's rank comes first: it also starts processes inside of SLURM's tasks, in another order than theirs.
    """
    names = ("RANK",) if "RANK" in os.environ else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return any(os.environ.get(name, "0") != "0" for name in names)


def say(sentence: str) -> None:
    """Log what takes time now, once for all devices."""
    if not is_worker():
        log.info(sentence)


@cache  # launchers pickle functions of the command's own module by value, which a cached one refuses
def loading() -> None:
    """Say that what takes seconds is imported now; once."""
    if "torch" not in sys.modules:
        say("loading torch, lightning and transformers ...")


def write_status(folder: Path, state: str, **more: Any) -> None:
    """Write status.json: running, finished, failed (with the reason) or interrupted; replaced atomically."""
    if is_worker():
        return
    path, earlier = folder / "status.json", read_status(folder)
    import torch  # takes seconds, and only what writes a status needs it

    packages = {name: version(name) for name in ("torch", "lightning", "transformers")}
    machine = {"python": platform.python_version(), "threads": torch.get_num_threads(), **packages}
    status = {k: v for k, v in earlier.items() if k != "reason"} | {"state": state, "machine": machine} | more
    replace_text(path, json.dumps(redact_secrets(status), indent=1) + "\n")


def record_failure(cfg: DictConfig, error: Exception) -> None:
    """Write the status.json of a sweep's cell that was refused before it had a folder."""
    folder = run_folder(cfg)
    if read_status(folder).get("state") not in ("failed", "finished"):
        folder.mkdir(parents=True, exist_ok=True)
        write_status(folder, "failed", label=run_label(cfg), reason=f"{type(error).__name__}: {error}")
