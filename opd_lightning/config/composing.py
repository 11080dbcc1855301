"""Composing: the folder conf/, and the configuration that overrides make of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from opd_lightning.config.aliases import renamed, updated
from opd_lightning.config.grammar import quote_override, quoted
from opd_lightning.config.no_columns import column_error

HERE = Path(__file__).resolve().parents[1]
CONF_DIR = str(next(p for p in (HERE / "conf", HERE.parent / "conf") if p.is_dir()))
"""The shipped configuration: inside the package when installed from a wheel, beside it in a checkout."""

OmegaConf.register_new_resolver("horizon", lambda *ends: 100 if set(ends) <= {None, -1} else -1, replace=True)
"""The default of trainer.max_steps: 100, or open (-1) where passes through the data, tokens, FLOPs or seconds end the run."""

OmegaConf.register_new_resolver("stand_in", lambda on, small, real: small if on else real, replace=True)
"""${stand_in:${model.stand_in},<stand-in>,<real>}: the stand-in if `model.stand_in` is set, else the real value."""

OmegaConf.register_new_resolver(
    "frozen_dtype",
    lambda dtype, precision: "bfloat16" if (dtype, precision) == ("float32", "bf16-mixed") else dtype,
    replace=True,
)
"""${frozen_dtype:${model.dtype},${trainer.precision}}: bfloat16 for a model that is not trained where products are bfloat16."""

OmegaConf.register_new_resolver("times", lambda n, x: n * x if type(x) in (int, float) else x, replace=True)
"""${times:2,${adapter.r}}: a multiple of another value; of what is no number the value itself, whose key has the error."""

ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")
"""Schedules without a horizon: a run under one of them can be extended, so `max_steps` is not part of its identity."""


def compose(overrides: list[str], folders: Sequence[Path] = ()) -> DictConfig:
    """The configuration from overrides, inside or outside a Hydra application; `folders` hold users' own options.

    Raises:
        ValueError: a mapping of columns names one that no example has a part for.
    """
    overrides = [quote_override(renamed(override)) for override in overrides]
    if problem := next((p for override in overrides if (p := column_error(override))), None):
        raise ValueError(problem)
    if folders:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in folders)}]"]
    if GlobalHydra.instance().is_initialized():
        return updated(hydra.compose("config", overrides=overrides))
    with hydra.initialize_config_dir(CONF_DIR, version_base="1.3"):
        return updated(hydra.compose("config", overrides=overrides))


def plain(cfg: DictConfig | ListConfig) -> Any:
    """The resolved configuration as dicts and lists."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def first_stage(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that makes this run's start model, itself from `model.path`; in `<study>.stages`.

    It has a separate study, for the runs of a study are compared with each other.
    """
    passed = (
        "model.path",
        "model.stand_in",
        "seed",
        "output_dir",
        "max_tokens_per_microbatch",
        "logits_chunk_size",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.precision",
    )
    shared = [f"{key}={json.dumps(OmegaConf.select(cfg, key))}" for key in passed]
    shared += [f"trainer.strategy={json.dumps(plain(cfg)['trainer']['strategy'])}", f"study.name={cfg.study.name}.stages"]
    stage = compose([*cfg.init_from_run, *shared, "logger=none"])
    stage.logger = None if cfg.logger is None else OmegaConf.to_container(cfg.logger)
    return stage
