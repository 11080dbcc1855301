"""Hints on unknown keys: the option that has such a key, its name here, or the nearest name."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.config.aliases import KEYS
from opd_lightning.config.familiar import FAMILIAR, familiar
from opd_lightning.config.schema import leaves, parameters_of
from opd_lightning.config.trainer_arguments import refusal


def hint(key: str, place: str, node: Mapping[str, Any], base: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """The end of a sentence on an unknown key.

    Args:
        key: all of it, such as loss.divergence.beta.
        place, node: of it, what exists; an empty place is the top.
        base: the whole configuration.
        folders: with the options of groups.
    """
    name, first = key.rpartition(".")[2], key.removeprefix(f"{place}.").split(".")[0]
    if options := owners(key, folders):
        return f"; it belongs to {' or '.join(options[:4])}."
    if not place and (sentence := trainers(name)):
        return sentence
    if elsewhere := familiar(name):
        return elsewhere
    if same := [leaf for leaf, _ in leaves(dict(base)) if leaf.rpartition(".")[2] == name]:
        return f"; did you mean {' or '.join(same[:3])}?"
    top = place and f"{place}."
    groups = [] if place else [path.name for path in folders[0].iterdir() if path.is_dir()]
    here = {str(n): f"{top}{n}" for n in [*node, *groups] if not str(n).startswith("_")}
    inside = {
        leaf.rpartition(".")[2]: f"{top}{leaf}" for leaf, _ in leaves(dict(node)) if not leaf.split(".")[-1].startswith("_")
    }
    renamed = {old: KEYS[old] for old in KEYS if "." not in old and KEYS[old] in here} if not place else {}
    more = {n: f"+{top}{n}" for n in arguments(node)}
    for known in (here, inside, renamed, more):
        if close := get_close_matches(first, known, n=1):
            return f"; did you mean {known[close[0]]}?"
    return f"; known are {', '.join(sorted(here.values()))}." if here else "."


def arguments(node: Mapping[str, Any]) -> list[str]:
    """The arguments of a node's target, and none where it has no plain one."""
    try:
        return [] if node.get("_partial_") else list(parameters_of(node["_target_"]))
    except (KeyError, ValueError, AttributeError):
        return []


def trainers(name: str) -> str | None:
    """The end of the sentence on an argument of Lightning's Trainer that stands at the top."""
    if name not in parameters_of("lightning.Trainer") or name in FAMILIAR:
        return None
    refused = refusal(name, "...")
    return f"; {refused.partition(': ')[2]}" if refused else f"; it is Lightning's: +trainer.{name}=..."


def owners(key: str, folders: Sequence[Path]) -> list[str]:
    """The options that have a key, such as loss/divergence=jsd for loss.divergence.beta."""
    parts = key.split(".")
    for i in range(len(parts) - 1, 0, -1):
        group = "/".join(parts[:i])
        files = [path for folder in folders for path in sorted((folder / group).glob("*.yaml"))]
        found = [f"{group}={path.stem}" for path in files if has(path, parts[i:])]
        if files:
            return found
    return []


def has(path: Path, parts: Sequence[str]) -> bool:
    """Whether an option's file, or one that it is made of, sets a key."""
    return any(is_set(tree, parts) for tree in trees(path))


def is_set(tree: Any, parts: Sequence[str]) -> bool:
    """Whether nested mappings have a key."""
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def trees(path: Path) -> Iterator[Any]:
    """The content of an option's file and of those of its group that its defaults name."""
    try:
        text = path.read_text()
        tree = yaml.safe_load(text)
    except (OSError, yaml.YAMLError):
        return
    if not isinstance(tree, dict) or text.startswith("# @package _global_"):
        return
    yield {key: value for key, value in tree.items() if key != "defaults"}
    for name in tree.get("defaults", []):
        if isinstance(name, str) and name not in ("_self_", path.stem):
            yield from trees(path.with_name(f"{name}.yaml"))
