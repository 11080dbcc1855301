"""What the command line asks for and cannot be had, said in one sentence before Hydra composes anything."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from opd_lightning.config import CONF_DIR, compose
from opd_lightning.config.grammar import is_sweep, shell, split_words, taken, unreadable
from opd_lightning.config.names import nearest
from opd_lightning.config.schema import leaves, parameters_of
from opd_lightning.config.trainer_arguments import refusal
from opd_lightning.utils.secrets import is_secret


def explain(arguments: list[str]) -> str | None:
    """The first unknown option or key among command-line arguments, with the nearest name, or a folder that cannot be.

    In a sweep every cell is looked at before the first begins. None if there is nothing of the kind.
    """
    (flags, words), sweep = split_words(arguments), is_sweep(arguments)
    if any(a.split("=")[0] in ("--config-path", "-cp", "--config-name", "-cn") for a in flags):
        return None  # another configuration altogether, and what it has is for Hydra to say
    words = [taken(word, sweep) for word in words]
    if problem := unreadable(words, sweep) or no_folder(flags):
        return problem
    overrides = OverridesParser.create().parse_overrides(words)
    folders = [Path(CONF_DIR), *more_folders(arguments, overrides)]
    chosen = [o for o in overrides if any((folder / o.key_or_group).is_dir() for folder in folders)]
    places = [unwritable(str(o.value())) for o in overrides if o.key_or_group == "output_dir"]
    problems = [*map(open_secret, overrides), *places, *(no_option(o, folders) for o in chosen)]
    return next((p for p in problems if p), None) or no_key(overrides, chosen, folders)


def configured(arguments: list[str]) -> DictConfig:
    """The configuration that a command line of one run describes: overrides, and --config-dir for options of the user's own.

    Raises:
        ValueError: an override, a folder or a flag cannot be taken.
    """
    flags, words = split_words(arguments)
    known = [a for before, a in pairwise(["", *flags]) if re.match(r"(--config-dir|-cd)(=|$)", a) or before in DIR]
    if other := [a for a in flags if a not in known]:
        raise ValueError(f"{other[0]} is no option of this command, which looks at one run; of Hydra's it takes --config-dir.")
    if problem := explain(arguments):
        raise ValueError(problem)
    parsed = OverridesParser.create().parse_overrides([taken(word) for word in words])
    return compose(words, more_folders(arguments, parsed))


DIR = ("--config-dir", "-cd")


def config_dirs(flags: list[str]) -> list[str]:
    """The folders that --config-dir names."""
    found = [a.split("=", 1)[1] for a in flags if a.startswith(("--config-dir=", "-cd="))]
    return found + [after for before, after in pairwise(flags) if before in DIR]


def no_folder(flags: list[str]) -> str | None:
    """A sentence if --config-dir names no folder."""
    if (flags or [""])[-1] in DIR:
        return f"{flags[-1]} has no folder behind it; write {flags[-1]}=<folder>."
    return next((f"--config-dir={path} is no folder." for path in config_dirs(flags) if not Path(path).is_dir()), None)


def more_folders(arguments: list[str], overrides: list[Override]) -> list[Path]:
    """Configuration folders beside the shipped one: --config-dir and hydra.searchpath."""
    found = config_dirs(split_words(arguments)[0])
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            given = override.value()
            found += [str(path).removeprefix("file://") for path in (given if isinstance(given, list) else [given])]
    return [Path(path).absolute() for path in found]


def no_option(override: Override, folders: list[Path]) -> str | None:
    """A sentence if an override chooses an option that its group does not have."""
    group = override.key_or_group
    options = sorted(p.stem for folder in folders for p in (folder / group).glob("*.yaml"))
    wrong = [value for value in values(override) if value not in options]
    return f"{group}={wrong[0]} is no option of {group}{nearest(wrong[0], options)}" if wrong else None


def no_key(overrides: list[Override], chosen: list[Override], folders: list[Path]) -> str | None:
    """A sentence if an override sets a key that is not there under one of the chosen options."""
    adding = [o for o in overrides if o.is_add() or o.is_force_add() or o.is_delete()]
    keys = [o for o in overrides if o not in chosen and o not in adding and re.split("[./]", o.key_or_group)[0] != "hydra"]
    # Of a sweep over options, each option is tried once beside the first of the others.
    named = {o.key_or_group: values(o) for o in chosen if values(o)}
    first = {group: options[0] for group, options in named.items()}
    cells = [first, *({**first, group: option} for group, options in named.items() if keys for option in options[1:])]
    for cell in cells:
        line = [f"{group}={option}" for group, option in cell.items()]
        try:
            base = OmegaConf.to_container(compose([*line, *(o.input_line for o in adding if o.input_line)], folders[1:]))
        except HydraException as error:
            return retold(str(error), folders)
        except YAMLError as error:
            return f"a configuration file is no YAML: {' '.join(str(error).split())}"
        swept = [f"{group}={option}" for group, option in cell.items() if len(named[group]) > 1]
        beside = f" under {' '.join(swept)}" if swept else ""
        sentence = next((sentence for o in keys if (sentence := unknown(o, base, beside))), None)
        if sentence:
            return sentence
    return None


def retold(message: str, folders: list[Path]) -> str:
    """What Hydra says of a configuration that cannot be composed, in one sentence and with the nearest name."""
    if found := re.search(r"Could not find '([\w/]+)/([\w.-]+)'", message):
        group, option = found.groups()
        options = sorted(p.stem for folder in folders for p in (folder / group).glob("*.yaml"))
        return f"override {group}: {option} is no option of {group}{nearest(option, options)}"
    return " ".join(message.split("Available options", maxsplit=1)[0].split())


def values(override: Override) -> list[Any]:
    """The options that an override names: one, or those of a sweep; a pattern (glob) is Hydra's to fill in."""
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def unknown(override: Override, base: Any, beside: str) -> str | None:
    """A sentence if a key is not in the composed configuration."""
    node, path = base, list[str]()
    for part in override.key_or_group.split("."):
        if node is None:
            place = ".".join(path)
            return f"{override.input_line}: {place} is null{beside}; choose an option for it ({place}=...) beside it."
        if isinstance(node, str) and node.startswith("${"):
            place, rest = ".".join(path), override.key_or_group.removeprefix(".".join([*path, ""]))
            return f"{override.input_line}: {place} follows {node}; give all of it, {shell(place, f'{{{rest}: ...}}')}."
        if not isinstance(node, dict):
            return None
        if part not in node:
            siblings = [".".join([*path, str(name)]) for name in node if not str(name).startswith("_")]
            groups = [] if path else [p.name for p in Path(CONF_DIR).iterdir() if p.is_dir()]
            inside = {
                ".".join([*path, leaf.rpartition(".")[2]]): ".".join([*path, leaf]) for leaf, _ in leaves(node) if "." in leaf
            }
            if sentence := unlisted(override, node, part):
                return sentence
            near = nearest(".".join([*path, part]), [*siblings, *groups], inside)
            return f"{override.input_line} is no key{beside}{near}"
        path.append(part)
        node = node[part]
    return None


def unlisted(override: Override, node: dict[str, Any], name: str) -> str | None:
    """A sentence if a key is an option that the node's target takes, and no file lists."""
    target = node.get("_target_")
    try:
        takes = isinstance(target, str) and name in parameters_of(target)
    except ValueError:
        return None
    if takes and override.key_or_group == f"trainer.{name}" and (told := refusal(name, override.value())):
        return told
    return f"{override.input_line}: {target} takes it, and no file lists it; add it, +{override.input_line}." if takes else None


def open_secret(override: Override) -> str | None:
    """A sentence if an override spells out a secret; it would stand in the shell's history and in Hydra's files."""
    name = spelled_out(override.key_or_group, values(override))
    if name is None:
        return None
    return (
        f"{name} on the command line would end in files and in the shell's history; set it as an environment "
        f"variable (WANDB_API_KEY and HF_TOKEN are read as they are), or give '{name}=${{oc.env:NAME}}'."
    )


def spelled_out(name: str, value: Any) -> str | None:
    """The first name of a secret with a value of its own, in a value however nested."""
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := spelled_out(f"{name}.{k}", v))), None)
    if isinstance(value, list):
        return next((found for v in value if (found := spelled_out(name, v))), None)
    return name if is_secret(name) and value not in (None, "") and "${" not in str(value) else None


def unwritable(folder: str) -> str | None:
    """A sentence if nothing can be written below a folder, which need not exist yet."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK):
        return None
    reason = "is not writable" if place.is_dir() else "is a file"
    return f"output_dir={folder} cannot be written ({place} {reason}); choose another folder."
