"""Identity: the hash of a run's configuration, and the run's folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opd_lightning.config import first_stage, plain
from opd_lightning.config.composing import ENDLESS_SCHEDULES
from opd_lightning.config.precision import EXACT, is_auto, with_precision
from opd_lightning.config.trainer_arguments import epochs_of
from opd_lightning.utils.atomic_files import read_object

HASHED = (
    "init_from_run",
    "model",
    "adapter",
    "task",
    "environment",
    "rollout",
    "teacher",
    "context",
    "reference",
    "loss",
    "optim",
    "data",
    "budget",
)
"""Configuration keys in the hash. Not in it: the seed (in the folder's name), paths, loggers, devices and micro-batches."""

TRANSPORT = ("servers",)
"""Nodes in them that are not in the hash: where a model is served does not change the result."""

PRECISION = "precision"
"""The key of a run's precision in status.json; runs from before trainer.precision=auto lack it."""

LATER = {"max_rows": None, "train_on": "last", "columns.tools": None}
"""Options of tasks that were added later, with the values that change nothing."""

LATER_ANYWHERE = {"policy_gradient": {"credit": "episode"}, "context": {"at": "first"}, "choices": {"at": "first"}}
"""The same for nodes of these names, and those directly in them, wherever they stand."""


def run_hash(cfg: DictConfig) -> str:
    """Eight hexadecimal digits of a configuration; they change with whatever changes the result, except the seed."""
    resolved = plain(cfg)
    identity = {key: without_later(key, without(resolved[key], TRANSPORT)) for key in HASHED if key in resolved}
    if isinstance(loss := identity["loss"], dict) and loss.get("returns", 0) is None:
        del loss["returns"]
    if isinstance(rollout := identity["rollout"], dict) and rollout.get("async_steps") == 0:
        del rollout["async_steps"]
    for place, default in LATER.items():  # runs from before these were options are found again
        *parents, key = place.split(".")
        node: Any = identity["task"]
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.get(key, ...) == default:
            del node[key]
    if cfg.init_from_run is not None:
        # The first stage's hash, not its overrides; its number of updates decides this run's start model too.
        stage = first_stage(cfg)
        identity["init_from_run"] = [run_hash(stage), stage.trainer.max_steps, *filter(None, [epochs_of(stage.trainer)])]
    identity["precision"] = resolved["trainer"]["precision"]
    if resolved["optim"]["schedule"] not in ENDLESS_SCHEDULES:
        identity["max_steps"] = resolved["trainer"]["max_steps"]
        if epochs := epochs_of(resolved["trainer"]):
            identity["max_epochs"] = epochs
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()


def without(value: Any, names: tuple[str, ...]) -> Any:
    """A copy without the keys of these names, at any depth of nested dictionaries."""
    return {k: without(v, names) for k, v in value.items() if k not in names} if isinstance(value, dict) else value


def without_later(name: str, value: Any) -> Any:
    """A node of this name without the options in `LATER_ANYWHERE` that change nothing, at any depth."""
    if not isinstance(value, dict):
        return value
    kept = {key: without_later(name if name == "choices" else key, part) for key, part in value.items()}
    return {key: part for key, part in kept.items() if part != LATER_ANYWHERE.get(name, {}).get(key, ...)}


def run_folder(cfg: DictConfig) -> Path:
    """<output_dir>/<study>/<name>-<hash>/seed-<seed>: the same command finds its run again, on another machine too.

    `auto` is hashed as that word, not as what it becomes. A run from before it, whose default was 32-true, is still found.
    """
    if is_auto(cfg) and predates_auto(former := folder_of(with_precision(cfg, EXACT))):
        return former
    return folder_of(cfg)


def folder_of(cfg: DictConfig) -> Path:
    """The folder by the hash alone."""
    return Path(str(cfg.output_dir)) / str(cfg.study.name) / f"{cfg.name}-{run_hash(cfg)}" / f"seed-{cfg.seed}"


def predates_auto(folder: Path) -> bool:
    """Whether a folder has a run that was begun before trainer.precision=auto."""
    return (folder / "config.yaml").is_file() and PRECISION not in read_object(folder / "status.json")


def is_run(path: str) -> bool:
    """Whether a path is the folder of a run with a checkpoint."""
    return (Path(path) / "checkpoints" / "last.ckpt").is_file() and (Path(path) / "config.yaml").is_file()
