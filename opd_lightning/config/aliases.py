"""Aliases: old `_target_` paths, package paths and configuration keys, each accepted with one warning.

They are accepted for one release, on the command line, in users' own files and in saved runs.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from opd_lightning.utils.deprecation import warn, warn_once

OBJECTS = {
    "opd_lightning.teacher.External": "opd_lightning.teachers.external",
    "opd_lightning.teacher.FrozenStart": "opd_lightning.teachers.frozen",
    "opd_lightning.teacher.Average": "opd_lightning.teachers.average",
    "opd_lightning.teacher.TrustRegion": "opd_lightning.teachers.trust_region",
    "opd_lightning.teacher.Live": "opd_lightning.teachers.live",
    "opd_lightning.callbacks.Bookkeeping": "opd_lightning.callbacks.CostLedger",
    "opd_lightning.callbacks.Guards": "opd_lightning.callbacks.HealthChecks",
    "opd_lightning.context.Quote": "opd_lightning.teachers.contexts.PrivilegedContext",
    "opd_lightning.teachers.contexts.Quote": "opd_lightning.teachers.contexts.PrivilegedContext",
    "opd_lightning.teachers.contexts.builders.Quote": "opd_lightning.teachers.contexts.PrivilegedContext",
    "opd_lightning.context.builders.Quote": "opd_lightning.teachers.contexts.PrivilegedContext",
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
SAMPLING = {name: f"sampling.{name}" for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
ARGUMENTS: dict[str, dict[str, str]] = {
    f"opd_lightning.rollout.{name}": SAMPLING
    for name in ("StudentRollout", "TeacherRollout", "DatasetRollout", "MixtureRollout")
} | {
    "opd_lightning.evaluation.SampledAccuracy": SAMPLING | {"samples": "sampling.n"},
    "opd_lightning.evaluation.Robustness": {
        name: f"perturbations.{name}" for name in ("openings", "corrupted", "distractors", "temperatures", "noises", "seed")
    },
}
"""Arguments of a target that have moved into an object among its arguments."""
PARTS = {
    "sampling": "opd_lightning.types.SamplingParams",
    "perturbations": "opd_lightning.evaluation.Perturbations",
    "renderer": "opd_lightning.data.renderer.with_template_options",
}
KEYS = (
    {
        "start_from": "init_from_run",
        "micro_tokens": "max_tokens_per_microbatch",
        "chunk": "logits_chunk_size",
        "loss.support": "loss.vocab_support",
        "loss/support": "loss/vocab_support",
        "loss.vocab_support.sampler_cap": "loss.vocab_support.importance_sampling_cap",
        "loss.vocab_support.rest": "loss.vocab_support.tail_bucket",
        "loss.policy_gradient.sampler_cap": "loss.policy_gradient.importance_sampling_cap",
        "callbacks.guards": "callbacks.health_checks",
        "callbacks.health_checks.dead_groups": "callbacks.health_checks.frac_reward_zero_std",
    }
    | {
        f"{place}.{old}": f"{place}.{new}"
        for place in ("rollout", "rollout.other")
        for old, new in (
            ("samples_per_prompt", "num_generations"),
            ("updates_per_rollout", "num_iterations"),
            ("truncated", "mask_truncated_completions"),
            *SAMPLING.items(),
        )
    }
    | {
        f"evaluation.suite.{name}.{old}": f"evaluation.suite.{name}.{new}"
        for name, target in (("sampled", "SampledAccuracy"), ("robustness", "Robustness"))
        for old, new in ARGUMENTS[f"opd_lightning.evaluation.{target}"].items()
    }
)
"""Configuration keys and groups: "old.key" or "old/group" to the new one, in the order in which they are applied."""
VALUES = {"truncated": {"keep": False, "mask": True}, "rest": {"tail": True, "renormalise": False}}
"""Values of old keys as those of the new ones, by the key's last part."""


SINCE: dict[str, Any] = {
    "generator": {"_target_": "opd_lightning.generation.TransformersGenerator"},
    "environment": None,
}
"""New keys that saved runs lack, with the values that keep their behaviour."""


def moved(target: str, warning: bool = True) -> str:
    """The current name of a dotted path."""
    module, _, name = target.rpartition(".")
    new = OBJECTS.get(target, f"{MODULES[module]}.{name}" if module in MODULES else target)
    if warning and new != target:
        warn(target, new)
    return new


def modernised(node: Any, warning: bool = True) -> Any:
    """A configuration's containers with current names."""
    if isinstance(node, dict):
        node = {key: modernised(value, warning) for key, value in node.items()}
        if isinstance(node.get("_target_"), str):
            node["_target_"] = moved(node["_target_"], warning)
            regroup(node, warning)
        return node
    if isinstance(node, list):
        return [modernised(value, warning) for value in node]
    if isinstance(node, str):
        node = next((new + node[len(old) :] for old, new in FOLDERS.items() if node.startswith(old)), node)
        return re.sub(r"\$\{([\w.]+)\}", lambda match: f"${{{KEYS.get(match[1], match[1])}}}", node)
    return node


def regroup(node: dict[str, Any], warning: bool) -> None:
    """Move old arguments of a target into the object that holds them now."""
    for old, new in old_arguments(node).items():
        if warning:
            warn(f"{node['_target_']}({old}=)", new)
        value, (part, name) = node.pop(old), new.split(".")
        if value is not None:
            node.setdefault(part, {"_target_": PARTS[part]})[name] = value


def old_arguments(node: dict[str, Any]) -> dict[str, str]:
    """The arguments of a node that have moved, with their new places."""
    target = str(node.get("_target_"))
    moves = ARGUMENTS.get(target, {})
    if target.startswith("opd_lightning.evaluation."):
        moves = moves | {"template_options": "renderer.template_options"}
    return {old: new for old, new in moves.items() if old in node}


def has_old_names(node: Any) -> bool:
    """Whether a configuration has old names."""
    if isinstance(node, dict):
        target = node.get("_target_")
        old = isinstance(target, str) and (target in OBJECTS or target.rpartition(".")[0] in MODULES)
        return old or bool(old_arguments(node)) or any(map(has_old_names, node.values()))
    return isinstance(node, list) and any(map(has_old_names, node))


def read_run(folder: str | Path) -> dict[str, Any]:
    """The config.yaml of a run with current names; keys that it lacks have their defaults."""
    config = yaml.safe_load((Path(folder) / "config.yaml").read_text())
    if "generator" not in config:
        warn_once(f"{folder} was made by an earlier version; the old names in its config.yaml are read for one release.")
    return rename_keys(SINCE | modernised(config, warning=False), warning=False)


def updated(cfg: DictConfig) -> DictConfig:
    """A composed configuration with current names, where users' own files have old ones."""
    tree: Any = OmegaConf.to_container(cfg)
    if not has_old_names(tree) and rename_keys(deepcopy(tree), warning=False) == tree:
        return cfg
    renewed = OmegaConf.create(rename_keys(modernised(tree)))
    OmegaConf.set_struct(renewed, OmegaConf.is_struct(cfg))
    return renewed


def rename_keys(config: dict[str, Any], warning: bool = True) -> dict[str, Any]:
    """Rename old keys of nested dictionaries, in place."""
    for old, new in KEYS.items():
        if rename(config, old.replace("/", ".").split("."), new.replace("/", ".").split(".")) and warning:
            warn(old, new)
    return config


def rename(config: dict[str, Any], old: Sequence[str], new: Sequence[str]) -> bool:
    """Move a value of nested dictionaries, if it exists, and merge it with one at the new place; returns whether it did."""
    node: Any = config
    for key in old[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or old[-1] not in node:
        return False
    value = node.pop(old[-1])
    if isinstance(value, str):
        value = VALUES.get(old[-1], {}).get(value, value)
    for key in new[:-1]:
        config = config.setdefault(key, {})
    existing = config.get(new[-1])
    config[new[-1]] = {**existing, **value} if isinstance(existing, dict) and isinstance(value, dict) else value
    return True


def renamed(override: str) -> str:
    """A command-line override with current keys."""
    match = re.match(r"([+~]*)([\w./]+)(.*)", override, re.DOTALL)
    if match is None:
        return override
    sign, key, rest = match.groups()
    for old, new in KEYS.items():
        if key == old or key.startswith((f"{old}.", f"{old}@")):
            warn(old, new)
            key = new + key[len(old) :]
            values = VALUES.get(old.split(".")[-1], {})
            if rest.startswith("=") and set(words := rest[1:].split(",")) <= values.keys():
                rest = f"={','.join(str(values[word]).lower() for word in words)}"
    return f"{sign}{key}{rest}"
