"""Old names of this release: `_target_` paths, package paths and configuration keys that have moved, each with one warning.

Keys are read on the command line and in saved runs, `_target_`s everywhere, for one release; then they are refused.
"""

import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)

OBJECTS = {
    "opd_lightning.teacher.External": "opd_lightning.teachers.external",
    "opd_lightning.teacher.FrozenStart": "opd_lightning.teachers.frozen",
    "opd_lightning.teacher.Average": "opd_lightning.teachers.average",
    "opd_lightning.teacher.TrustRegion": "opd_lightning.teachers.trust_region",
    "opd_lightning.teacher.Live": "opd_lightning.teachers.live",
    "opd_lightning.callbacks.Bookkeeping": "opd_lightning.callbacks.CostLedger",
    "opd_lightning.callbacks.Guards": "opd_lightning.callbacks.HealthChecks",
}
MODULES = {
    "opd_lightning.context.builders": "opd_lightning.teachers.contexts.builders",
    "opd_lightning.context": "opd_lightning.teachers.contexts",
    "opd_lightning.losses.divergence": "opd_lightning.losses.divergences",
    "opd_lightning.losses.support": "opd_lightning.losses.vocab_support",
    "opd_lightning.losses.weight": "opd_lightning.losses.token_weights",
    "opd_lightning.losses.terms": "opd_lightning.losses.policy_gradient",
    "opd_lightning.losses.advantage": "opd_lightning.losses.advantages",
    "opd_lightning.tasks.world": "opd_lightning.toy.world",
    "opd_lightning.tasks.instructions": "opd_lightning.toy.instructions",
    "opd_lightning.evaluation.text": "opd_lightning.evaluation.divergence",
    "opd_lightning.evaluation.teacher": "opd_lightning.evaluation.teacher_gap",
    "opd_lightning.callbacks.guards": "opd_lightning.callbacks.health_checks",
    "opd_lightning.callbacks.estimators": "opd_lightning.callbacks.gradient_estimators",
    "opd_lightning.optim": "opd_lightning.models.optimizer",
    "opd_lightning.adapters": "opd_lightning.models.adapters",
    "opd_lightning.stand_in": "opd_lightning.models.stand_in",
    "opd_lightning.sweep": "opd_lightning.reporting.overview",
}
FOLDERS = {"pkg://opd_lightning/assets/": "pkg://opd_lightning/toy/assets/"}
KEYS = {
    "micro_tokens": "max_tokens_per_microbatch",
    "chunk": "logits_chunk_size",
    "loss.support": "loss.vocab_support",
    "loss/support": "loss/vocab_support",
    "loss.vocab_support.sampler_cap": "loss.vocab_support.importance_sampling_cap",
    "loss.policy_gradient.sampler_cap": "loss.policy_gradient.importance_sampling_cap",
    "callbacks.guards": "callbacks.health_checks",
    "callbacks.health_checks.dead_groups": "callbacks.health_checks.frac_reward_zero_std",
} | {
    f"{place}.{old}": f"{place}.{new}"
    for place in ("rollout", "rollout.other")
    for old, new in (
        ("samples_per_prompt", "num_generations"),
        ("updates_per_rollout", "num_iterations"),
        ("truncated", "mask_truncated_completions"),
    )
}
"""Configuration keys and groups: "old.key" or "old/group" to the new one, in the order in which they are applied."""
VALUES = {"keep": False, "mask": True}
"""Values of `truncated` as those of `mask_truncated_completions`."""


SINCE: dict[str, Any] = {
    "generator": {"_target_": "opd_lightning.generation.TransformersGenerator"},
    "environment": None,
}
"""What configurations have had since, with what runs did before."""


@cache
def say_once(sentence: str) -> None:
    """A warning, once per process."""
    log.warning(f"warning: {sentence}")


def warn(old: str, new: str) -> None:
    """Say once that a name has moved."""
    say_once(f"{old} is now {new}; the old name is read for one release.")


def moved(target: str, warning: bool = True) -> str:
    """A dotted path by its name of today."""
    module, _, name = target.rpartition(".")
    new = OBJECTS.get(target, f"{MODULES[module]}.{name}" if module in MODULES else target)
    if warning and new != target:
        warn(target, new)
    return new


def modernised(node: Any, warning: bool = True) -> Any:
    """Containers of a configuration with the names of today."""
    if isinstance(node, dict):
        told = {key: modernised(value, warning) for key, value in node.items()}
        return told | ({"_target_": moved(told["_target_"], warning)} if isinstance(told.get("_target_"), str) else {})
    if isinstance(node, list):
        return [modernised(value, warning) for value in node]
    if isinstance(node, str):
        return next((new + node[len(old) :] for old, new in FOLDERS.items() if node.startswith(old)), node)
    return node


def has_old_names(node: Any) -> bool:
    """Is there something to modernise?"""
    if isinstance(node, dict):
        return any(
            (isinstance(value, str) and key == "_target_" and (value in OBJECTS or value.rpartition(".")[0] in MODULES))
            or has_old_names(value)
            for key, value in node.items()
        )
    return isinstance(node, list) and any(map(has_old_names, node))


def read_run(folder: str | Path) -> dict[str, Any]:
    """config.yaml of a run, with the names of today; keys that have come since have their defaults."""
    config = yaml.safe_load((Path(folder) / "config.yaml").read_text())
    if "generator" not in config:
        say_once(f"{folder} was made by an earlier version; the old names in its config.yaml are read for one release.")
    config = SINCE | modernised(config, warning=False)
    for old, new in KEYS.items():
        rename(config, old.replace("/", ".").split("."), new.replace("/", ".").split("."))
    return config


def rename(config: dict[str, Any], old: Sequence[str], new: Sequence[str]) -> None:
    """Move a value of nested dictionaries, if it is there."""
    node: Any = config
    for key in old[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or old[-1] not in node:
        return
    value = node.pop(old[-1])
    if old[-1] == "truncated":
        value = VALUES.get(value, value)
    for key in new[:-1]:
        config = config.setdefault(key, {})
    config[new[-1]] = value


def renamed(override: str) -> str:
    """An override of the command line with the keys of today."""
    found = re.match(r"([+~]*)([\w./]+)(.*)", override, re.DOTALL)
    if found is None:
        return override
    sign, key, rest = found.groups()
    for old, new in KEYS.items():
        if key == old or key.startswith((f"{old}.", f"{old}@")):
            warn(old, new)
            key = new + key[len(old) :]
            if old.endswith("truncated") and re.fullmatch(r"=(keep|mask)(,(keep|mask))*", rest):
                rest = rest.replace("keep", "false").replace("mask", "true")
    return f"{sign}{key}{rest}"
