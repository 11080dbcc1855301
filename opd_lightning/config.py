"""Configuration: where conf/ is, how a node becomes an object, and which folder a run gets."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import get_object
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf

HERE = Path(__file__).resolve().parent
CONF_DIR = str(next(p for p in (HERE / "conf", HERE.parent / "conf") if p.is_dir()))
"""The shipped configuration: inside the package when installed from a wheel, beside it in a checkout."""

OmegaConf.register_new_resolver("horizon", lambda *budgets: 100 if set(budgets) == {None} else -1, replace=True)
"""The default of trainer.max_steps: 100, or open (-1) where a budget of tokens, FLOPs or seconds ends the run."""

OmegaConf.register_new_resolver("stand_in", lambda on, small, real: small if on else real, replace=True)
"""${stand_in:${model.stand_in},<stand-in>,<the real thing>}: what `model.stand_in` chooses between."""

HASHED = (
    "start_from",
    "model",
    "adapter",
    "task",
    "rollout",
    "teacher",
    "context",
    "reference",
    "loss",
    "optim",
    "data",
    "budget",
)
"""What makes a run another run. Not the seed (it names a folder inside), nor paths, loggers, devices or micro_tokens."""

ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")
"""Schedules without a horizon: a run under one of them can be extended, so `max_steps` is not part of its identity."""


def build(node: DictConfig | dict | None, **offers: Any) -> Any:
    """The object that a node's `_target_` describes; None for None.

    Args:
        offers: arguments that only the program knows, such as the tokenizer. The target and the targets inside it take
            those that they name.

    Raises:
        ValueError: what the target raised on its arguments, in its own words.
    """
    if node is None:
        return None
    try:
        return hydra.utils.instantiate(node, _convert_="all", **accepted(node, offers))
    except InstantiationException as error:
        told = explained(error, node)
        if told is None:
            raise
        raise ValueError(told) from error


def explained(error: InstantiationException, node: DictConfig | dict) -> str | None:
    """One sentence for what a target raised on its arguments; None for what is no matter of arguments.

    This program's own errors name their field; what a library says is told with the node that it is about.
    """
    cause = error.__cause__
    foreign = not str(node.get("_target_")).startswith(__package__)
    if isinstance(cause, ImportError) or (isinstance(cause, ValueError) and not foreign):
        return str(cause)
    if not foreign or not isinstance(cause, (ValueError, TypeError, MisconfigurationException)):
        return None
    place = (node._get_full_key(None) if isinstance(node, DictConfig) else "") or str(node.get("_target_"))
    return f"{place} cannot be made of its options ({' '.join(str(cause).split())[:300]}); change them ({place}.<option>=...)."


def accepted(node: DictConfig | dict, offers: dict[str, Any]) -> dict[str, Any]:
    """The offers that a node's target names and the configuration does not give, and within it those of its parts."""
    taken: dict[str, Any] = {}
    if "_target_" in node and not node.get("_partial_"):
        names = inspect.signature(get_object(node["_target_"])).parameters
        taken = {name: value for name, value in offers.items() if name in names and name not in node}
    for key, part in node.items():
        if isinstance(part, (dict, DictConfig)) and (inside := accepted(part, offers)):
            taken[str(key)] = inside
    return taken


def compose(overrides: list[str], folders: Sequence[Path] = ()) -> DictConfig:
    """The configuration of another run, inside or outside a Hydra application; `folders` hold options of the user's own."""
    if folders:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"]
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("config", overrides=overrides)
    with hydra.initialize_config_dir(CONF_DIR, version_base="1.3"):
        return hydra.compose("config", overrides=overrides)


def plain(cfg: DictConfig | ListConfig) -> Any:
    """The resolved configuration as dicts and lists."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def first_stage(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that makes this run's start model, itself from `model.path`; in `<study>.stages`.

    It has a study of its own because the runs of a study are compared with each other.
    """
    passed = (
        "model.path",
        "model.stand_in",
        "seed",
        "output_dir",
        "micro_tokens",
        "chunk",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.precision",
    )
    shared = [f"{key}={json.dumps(OmegaConf.select(cfg, key))}" for key in passed]
    shared += [f"trainer.strategy={json.dumps(plain(cfg)['trainer']['strategy'])}", f"study.name={cfg.study.name}.stages"]
    return compose([*cfg.start_from, *shared, *(["logger=none"] if cfg.logger is None else [])])


def run_hash(cfg: DictConfig) -> str:
    """Eight hexadecimal digits that change with whatever changes the result, seed apart."""
    resolved = plain(cfg)
    identity = {key: resolved[key] for key in HASHED if key in resolved}
    if cfg.start_from is not None:
        # What the first stage *is*, not how it was asked for; its horizon decides this run's start model too.
        stage = first_stage(cfg)
        identity["start_from"] = [run_hash(stage), stage.trainer.max_steps]
    identity["precision"] = resolved["trainer"]["precision"]
    if resolved["optim"]["schedule"] not in ENDLESS_SCHEDULES:
        identity["max_steps"] = resolved["trainer"]["max_steps"]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()


def run_folder(cfg: DictConfig) -> Path:
    """<output_dir>/<study>/<name>-<hash>/seed-<seed>: the same command finds its run again, another never meets it."""
    return Path(str(cfg.output_dir)) / str(cfg.study.name) / f"{cfg.name}-{run_hash(cfg)}" / f"seed-{cfg.seed}"
