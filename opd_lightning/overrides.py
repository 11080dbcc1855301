"""What the command line asks for and cannot be had, said in one sentence before Hydra composes anything."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from opd_lightning.config import CONF_DIR, compose
from opd_lightning.names import nearest

ELSEWHERE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
"""With these the configuration is not only the shipped one, and what it has is for Hydra to say."""


def explain(arguments: list[str]) -> str | None:
    """The first unknown option or key among command-line arguments, with the nearest name, or a folder that cannot be.

    None if there is nothing of the kind.
    """
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    if any(a.split("=")[0] in ELSEWHERE for a in arguments) or any("hydra.searchpath" in a for a in words):
        return None
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        return " ".join(str(error).split())
    chosen = [o for o in overrides if group_of(o).is_dir()]
    folders = [unwritable(str(o.value())) for o in overrides if o.key_or_group == "output_dir"]
    problems = [*folders, *(no_option(o) for o in chosen)]
    return next((p for p in problems if p), None) or no_key(overrides, chosen)


def no_option(override: Override) -> str | None:
    """A sentence if an override chooses an option that its group does not have."""
    options = sorted(p.stem for p in group_of(override).glob("*.yaml"))
    wrong = [value for value in values(override) if value is not None and value not in options]
    group = override.key_or_group
    return f"{group}={wrong[0]} is no option of {group}{nearest(wrong[0], options)}" if wrong else None


def no_key(overrides: list[Override], chosen: list[Override]) -> str | None:
    """A sentence if an override sets a key that is not there under the chosen options."""
    keys = [o for o in overrides if o not in chosen and not o.is_add() and not o.is_delete()]
    keys = [o for o in keys if o.key_or_group.split(".")[0] != "hydra"]
    if not keys or any(o.is_sweep_override() for o in chosen):
        return None  # which keys there are depends on the cell of the sweep
    try:
        base = OmegaConf.to_container(compose([o.input_line for o in chosen if o.input_line]), resolve=False)
    except HydraException as error:
        return " ".join(str(error).split())
    return next((sentence for o in keys if (sentence := unknown(o, base))), None)


def group_of(override: Override) -> Path:
    """The folder of the group that an override chooses from, if there is one."""
    return Path(CONF_DIR) / override.key_or_group


def values(override: Override) -> Iterable[Any]:
    """The options that an override names: one, or those of a sweep."""
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator())


def unknown(override: Override, base: Any) -> str | None:
    """A sentence if a key is not in the composed configuration."""
    node, path = base, list[str]()
    for part in override.key_or_group.split("."):
        if node is None:
            place = ".".join(path)
            return f"{override.input_line}: {place} is null here; choose an option for it ({place}=...) beside it."
        if not isinstance(node, dict):
            return None
        if part not in node:
            siblings = [".".join([*path, str(name)]) for name in node if not str(name).startswith("_")]
            groups = [] if path else [p.name for p in Path(CONF_DIR).iterdir() if p.is_dir()]
            return f"{override.input_line} is no key{nearest('.'.join([*path, part]), [*siblings, *groups])}"
        path.append(part)
        node = node[part]
    return None


def unwritable(folder: str) -> str | None:
    """A sentence if nothing can be written below a folder, which need not exist yet."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK):
        return None
    reason = "is not writable" if place.is_dir() else "is a file"
    return f"output_dir={folder} cannot be written ({place} {reason}); choose another folder."
