"""Labels: a run by its method and what distinguishes it from the other cells of its sweep, such as "sdft, lr 1e-4"."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from opd_lightning.utils.secrets import redact_secrets

AXES = "OPD_LIGHTNING_AXES"
"""The environment variable that tells the cells of a sweep which keys it sweeps, in whatever process they run."""
NAMED = ("method", "experiment", "study", "seed", "name", "output_dir", "hydra")
"""First parts of keys that a label has already, or leaves out."""
RUN_ONLY = ("logger", "callbacks", "evaluation", "trainer", "logits_chunk_size", "max_tokens_per_microbatch")
"""First parts of keys that make no other run; a label has them if they are swept."""
GENERIC = ("path", "name", "_target_")
"""Last parts of keys that say less than the part before them."""


def described(name: str, settings: Mapping[str, Any]) -> str:
    """A name with settings, such as "sdft, lr 1e-4, temperature 0.7"; texts as `short_value` returns stay as they are."""
    keys = short_keys(list(settings))
    parts = [f"{keys[place]} {short_value(value)}" for place, value in settings.items()]
    return ", ".join([name, *parts])


def short_keys(places: Sequence[str]) -> dict[str, str]:
    """Each place such as "optim.lr" by its last part; by its last two where several have the same."""
    split = {place: [part for part in place.replace("/", ".").split(".") if part] for place in places}
    shown = {place: parts[-2:-1] if parts[-1] in GENERIC and len(parts) > 1 else parts[-1:] for place, parts in split.items()}
    ends = list(shown.values())
    clear = {place: part if ends.count(part) == 1 else split[place][-2:] for place, part in shown.items()}
    return {place: " ".join(parts).replace("_", " ").strip() for place, parts in clear.items()}


def short_value(value: Any) -> str:
    """A value in few characters: 1e-4, none, true, or a target's last name."""
    if isinstance(value, Mapping):
        return str(value.get("_target_", "given")).rpartition(".")[2]
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value)


def short_values(values: Sequence[Any]) -> list[str]:
    """Values of one key as texts; of paths, and of targets, the last parts that tell them apart."""
    targets = [value["_target_"] for value in values if isinstance(value, Mapping) and "_target_" in value]
    if len(targets) == len(values):
        return tails(targets, ".")
    if all(isinstance(value, str) for value in values):
        return tails([value.rstrip("/") for value in values], "/")
    return [short_value(value) for value in values]


def tails(paths: Sequence[str], separator: str) -> list[str]:
    """The last parts of paths that tell them apart, without what all end in."""
    parts = [path.split(separator) for path in paths]
    while len(set(paths)) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    n, most = 1, max(map(len, parts))
    while n < most and len({tuple(p[-n:]) for p in parts}) < len(set(paths)):
        n += 1
    return [separator.join(p[-n:]) for p in parts]


def differing(trees: Sequence[Any], place: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The places at which configurations differ, with the value of each; a node of another target is one value."""
    if all(tree == trees[0] for tree in trees):
        return
    nodes = [tree for tree in trees if isinstance(tree, Mapping)]
    if len(nodes) < len(trees) or len({node.get("_target_") for node in nodes}) > 1:
        yield place, list(trees)
        return
    for key in dict.fromkeys(key for node in nodes for key in node):
        yield from differing([node.get(key) for node in nodes], f"{place}.{key}" if place else str(key))


def distinguished(name: str, trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each configuration: the name, and as few settings as tell them apart. Equal ones have equal labels."""
    chosen: dict[str, list[str]] = {}
    seen = [()] * len(trees)
    for place, values in differing(trees):
        texts = short_values(values)
        finer = [(*before, text) for before, text in zip(seen, texts, strict=True)]
        if len(set(finer)) > len(set(seen)):
            chosen[place], seen = texts, finer  # type: ignore[assignment]
    return [described(name, {place: texts[i] for place, texts in chosen.items()}) for i in range(len(trees))]


def label_of(cfg: DictConfig) -> str:
    """The label of the run that the command line describes: in a sweep by what is swept, else by what is set."""
    return described(str(cfg.name), dict(command_settings(cfg)))


def run_label(cfg: DictConfig) -> str:
    """The label of the run that the command line describes, with its seed."""
    return f"{label_of(cfg)}, seed {cfg.seed}"


def command_settings(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """The settings of the command line that distinguish its run; none of a run that is made in another way."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    if Path(str(hydra.sweep.dir)) != Path(str(cfg.output_dir)) / str(cfg.study.name):
        return  # a first stage, which the command line does not describe
    axes = os.environ.get(AXES) if hydra.mode == RunMode.MULTIRUN else None
    for override in OverridesParser.create().parse_overrides(list(hydra.overrides.task)):
        place = override.key_or_group
        if override.is_delete() or place.split(".")[0].split("/")[0] in (NAMED if axes else (*NAMED, *RUN_ONLY)):
            continue
        last = place.replace("/", ".").rpartition(".")[2]
        text = short_values([redact_secrets({last: plain_value(override.value())})[last]])[0]  # before a path is cut
        if (axes is None or place in axes.split(",")) and text not in str(cfg.name):
            yield place, text


def plain_value(value: Any) -> Any:
    """The value of an override without its quotes."""
    return value.text if hasattr(value, "text") else value


def swept(config: DictConfig) -> str:
    """The keys that a sweep varies, as a value of AXES."""
    params = config.hydra.sweeper.get("params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    varied = {o.key_or_group: o.is_sweep_override() for o in OverridesParser.create().parse_overrides(words)}
    return ",".join(key for key, several in varied.items() if several)
