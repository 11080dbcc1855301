"""The schema of a configuration: checks of its nodes and keys, and of each node's options against its target."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config import CONF_DIR
from opd_lightning.config.aliases import moved
from opd_lightning.config.familiar import familiar
from opd_lightning.config.names import find, nearest
from opd_lightning.config.signatures import signature

EXTRAS = {
    "generator": {"task", "tokenizer", "renderer", "folder"},
    "environment": {"task", "renderer"},
    "rollout": {"task", "tokenizer", "renderer", "folder", "environment", "window"},
    "teacher": {"context"},
    "reference": {"context"},
    "evaluation": {"task", "tokenizer", "renderer", "folder", "model", "environment", "window"},
    "trainer": {"logger", "callbacks", "default_root_dir"},
    "logger": {"save_dir", "id", "name"},
}
"""Arguments that the program adds to nodes, by the first part of their place."""

KEYS = {
    "data": {"batch_size", "max_prompt_tokens", "overlong"},
    "evaluation": {"every", "suite", "answers"},
    "study": {"name", "sweep", "baseline", "lr"},
}
"""The keys of nodes without a target."""

MAPPINGS = ("data", "study", "loss.coefficients", "evaluation", "evaluation.suite", "callbacks")
"""Nodes without a target."""

OBJECTS: tuple[str, ...] = ("budget", "model", "task", "generator", "rollout", "context", "optim", "trainer", "loss")
OBJECTS += ("loss.vocab_support", "loss.weight", "loss.aggregate")
"""Required nodes with a target."""

OPTIONAL: tuple[str, ...] = ("adapter", "teacher", "reference", "environment", "logger", "evaluation.answers")
OPTIONAL += ("loss.divergence", "loss.policy_gradient", "loss.cross_entropy", "loss.reference", "loss.clip", "loss.gate")
OPTIONAL += ("loss.returns",)
"""Nodes with a target that may be null."""

NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@cache
def shipped() -> dict[str, Any]:
    """The content of conf/config.yaml."""
    return yaml.safe_load((Path(CONF_DIR) / "config.yaml").read_text())


def check_shape(cfg: DictConfig) -> None:
    """Raises ValueError if a value or a node is missing.

    It runs before interpolations are resolved, for these refer to the nodes.
    """
    tree: Any = OmegaConf.to_container(cfg)
    if missing := next((place for place, value in leaves(tree) if value == "???"), None):
        raise ValueError(f"{missing} has no default; give it ({missing}=...).")
    for place in sorted({*MAPPINGS, *OBJECTS, *OPTIONAL}):
        node: Any = tree
        for key in place.split("."):
            node = node.get(key)
        if node is None and place in OPTIONAL:
            continue
        if not isinstance(node, dict):
            raise ValueError(
                f"{place}={shown(node)} is not what a run reads there, options by name; leave it out, or choose one."
            )
        if place not in MAPPINGS and "_target_" not in node:
            raise ValueError(
                f"{place} has options and no _target_ to take them; choose an option ({place.replace('.', '/')}=...)."
            )
    stage = tree["init_from_run"]
    if stage is not None and not (isinstance(stage, list) and all(isinstance(word, str) for word in stage)):
        raise ValueError(
            f"init_from_run={stage!r} is no list of overrides; give one (init_from_run=['experiment=...']), or null."
        )


def leaves(node: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values that are no mappings, each with its place."""
    for key, value in node.items():
        inside = f"{place}.{key}" if place else str(key)
        yield from leaves(value, inside) if isinstance(value, dict) else [(inside, value)]


def check_names(cfg: dict[str, Any]) -> None:
    """Raises ValueError for unknown keys, and for names of folders with characters that some systems lack."""
    groups = [next(iter(entry)).split("/")[0] for entry in shipped()["defaults"] if isinstance(entry, dict)]
    valid = {*shipped(), *groups} - {"defaults", "override hydra"}
    for key, value in cfg.items():
        if key not in valid:
            raise ValueError(f"{key}={value!r} is no key of a run{familiar(key) or nearest(key, valid)}")
    for place, keys in KEYS.items():
        for key, value in cfg[place].items():
            if key not in keys:
                raise ValueError(f"{place}.{key}={value!r} is no key{nearest(key, keys)}")
    for key, value in cfg["callbacks"].items():
        if value is not None and not (isinstance(value, dict) and "_target_" in value):
            raise ValueError(f"callbacks.{key} is no callback{nearest(key, [k for k in cfg['callbacks'] if k != key])}")
    for key, value in cfg["evaluation"]["suite"].items():
        if value is not None and not (isinstance(value, dict) and "_target_" in value):
            raise ValueError(
                f"evaluation.suite.{key} has options and no evaluation: they belong to another option of evaluation=; choose "
                f"that one, or drop them (~evaluation.suite.{key})."
            )
    if cfg["evaluation"]["answers"] is not None and "_target_" not in cfg["evaluation"]["answers"]:
        raise ValueError(
            "evaluation.answers has options of another option of evaluation=; drop them (evaluation.answers=null)."
        )
    for key, value in (("name", cfg["name"]), ("study.name", cfg["study"]["name"])):
        if not NAMES.fullmatch(str(value)):
            raise ValueError(f"{key}={value!r} names a folder; use letters, digits, '.', '_' and '-' only.")


def check_finite(node: Any, place: str = "") -> None:
    """Check that every number is finite, for NaN passes comparisons.

    Raises:
        ValueError: one is not.
    """
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            check_finite(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{place}={node} is no finite number; give one, or null where that sets no limit.")


def targets(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, and its place such as "loss.divergence"."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from targets(value, f"{place}.{key}" if place else str(key))


@cache
def parameters_of(target: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the object at a dotted path."""
    if (read := signature(moved(target))) is not None:
        return read
    target_object = find(target)
    if not callable(target_object):  # a module; an empty path finds one too
        raise ValueError(f"{target!r} is no class or function")
    return inspect.signature(target_object).parameters


def check_binding(place: str, node: dict[str, Any]) -> None:
    """Raises ValueError unless a node's keys are parameters of its target and no required one is missing."""
    if not isinstance(node["_target_"], str):
        raise ValueError(f"{place}._target_={shown(node['_target_'])} is no name of a class; give package.module.Class.")
    if not isinstance(node.get("_partial_", False), bool):
        raise ValueError(f"{place}._partial_={shown(node['_partial_'])} should be true or false.")
    try:
        parameters = parameters_of(node["_target_"])
    except ValueError as error:
        raise ValueError(f"{place}._target_={node['_target_']} cannot be imported ({error}).") from error
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    options = {key for key in node if not key.startswith("_")}
    extra = {name for start, names in EXTRAS.items() if f"{place}.".startswith(f"{start}.") for name in names}
    inside = {leaf.rpartition(".")[2]: leaf for leaf, _ in leaves(node) if "." in leaf}
    for key in options - set(parameters):
        end = familiar(key) or nearest(key, parameters, inside)
        raise ValueError(f"{place}.{key}={node[key]!r} is no option of {node['_target_']}{end}")
    for key in options & set(parameters):
        check_type(f"{place}.{key}", node[key], parameters[key].annotation)
    if not node.get("_partial_"):
        needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
        for key in needed - options - extra:
            raise ValueError(f"{place}.{key} is missing; {node['_target_']} needs it.")


PLAIN = (int, float, bool, str, type(None))
LISTS = (list, tuple, set, Sequence, Collection, Iterable)
NAMED = {type(None): "null", Callable: "a function (an option of its group)", Mapping: "options by name", Sequence: "a list"}


def check_type(place: str, value: Any, annotation: Any) -> None:
    """Raises ValueError unless a value fits an annotation of plain types; others must only be no wrong null or list."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if all(kind in PLAIN for kind in kinds):
        wrong = type(value) not in kinds and not (type(value) is int and float in kinds)
    elif {Any, object, inspect.Parameter.empty} & set(kinds) or not all(isinstance(get_origin(k) or k, type) for k in kinds):
        return
    else:
        listed = any((get_origin(kind) or kind) in LISTS for kind in kinds)
        wrong = (value is None and type(None) not in kinds) or (isinstance(value, list) and not listed)
    if not wrong:
        return
    names = " or ".join(NAMED.get(get_origin(kind) or kind, kind.__name__) for kind in kinds)
    if value is None:
        raise ValueError(f"{place} has no value and should be {names}; give it ({place}=...).")
    raise ValueError(f"{place}={value!r} should be {names}.")


def shown(value: Any) -> str:
    """A value in the command line's syntax."""
    return "null" if value is None else repr(value)
