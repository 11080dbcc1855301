"""Errors of the command line, each as one sentence, before Hydra composes the configuration."""

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
from opd_lightning.config.grammar import grammar_error, is_sweep, parse, parses, quote_override, shell, split_words
from opd_lightning.config.hints import hint, owners
from opd_lightning.config.names import nearest
from opd_lightning.config.no_columns import no_column, no_interpolation
from opd_lightning.config.schema import parameters_of
from opd_lightning.config.trainer_arguments import refusal
from opd_lightning.utils.secrets import is_secret


def explain(arguments: list[str]) -> str | None:
    """The first error among command-line arguments, such as an unknown option or key, with the nearest name; None without.

    In a sweep every cell is checked before the first begins.
    """
    (flags, words), sweep = split_words(arguments), is_sweep(arguments)
    if any(a.split("=")[0] in ("--config-path", "-cp", "--config-name", "-cn") for a in flags):
        return None  # another configuration, which Hydra checks itself
    words = [quote_override(word, sweep) for word in words]
    if sweep and not words:
        return "-m makes a sweep, and nothing has several values; write some, -m method=sft,opd, or leave -m out for one run."
    if problem := grammar_error(words, sweep) or no_folder(flags):
        return problem
    overrides = OverridesParser.create().parse_overrides(words)
    folders = [Path(CONF_DIR), *more_folders(arguments, overrides)]
    chosen = [o for o in overrides if any((folder / o.key_or_group).is_dir() for folder in folders)]
    places = [unwritable(str(o.value())) for o in overrides if o.key_or_group == "output_dir"]
    problems = [*map(open_secret, overrides), *places, *(no_option(o, folders) for o in chosen)]
    return next((p for p in problems if p), None) or no_key(overrides, chosen, folders) or packages(chosen, folders)


def configured(arguments: list[str]) -> DictConfig:
    """The configuration of a command line of one run: overrides, and --config-dir for users' own options.

    Raises:
        ValueError: an override, a folder or a flag is wrong.
    """
    flags, words = split_words(arguments)
    accepted = [a for before, a in pairwise(["", *flags]) if re.match(r"(--config-dir|-cd)(=|$)", a) or before in DIR]
    if rejected := [a for a in flags if a not in accepted]:
        raise ValueError(
            f"{rejected[0]} is no option of this command, which looks at one run; of Hydra's it takes --config-dir."
        )
    if problem := explain(arguments):
        raise ValueError(problem)
    parsed = OverridesParser.create().parse_overrides([quote_override(word) for word in words])
    return compose(words, more_folders(arguments, parsed))


DIR = ("--config-dir", "-cd")


def config_dirs(flags: list[str]) -> list[str]:
    """The folders of --config-dir."""
    folders = [a.split("=", 1)[1] for a in flags if a.startswith(("--config-dir=", "-cd="))]
    return folders + [after for before, after in pairwise(flags) if before in DIR]


def no_folder(flags: list[str]) -> str | None:
    """The error if --config-dir names no folder."""
    if (flags or [""])[-1] in DIR:
        return f"{flags[-1]} has no folder behind it; write {flags[-1]}=<folder>."
    return next((f"--config-dir={path} is no folder." for path in config_dirs(flags) if not Path(path).is_dir()), None)


def config_folders(arguments: list[str]) -> list[Path]:
    """All configuration folders of a command line whose overrides need not be right."""
    overrides = [parse(word) for word in split_words(arguments)[1] if parses(word)]
    return [Path(CONF_DIR), *more_folders(arguments, overrides)]


def more_folders(arguments: list[str], overrides: list[Override]) -> list[Path]:
    """The configuration folders of --config-dir and hydra.searchpath."""
    folders = config_dirs(split_words(arguments)[0])
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            value = override.value()
            folders += [str(path).removeprefix("file://") for path in (value if isinstance(value, list) else [value])]
    return [Path(path).absolute() for path in folders]


def no_option(override: Override, folders: list[Path]) -> str | None:
    """The error if an override chooses an option that its group lacks."""
    group = override.key_or_group
    options = sorted(p.stem for folder in folders for p in (folder / group).glob("*.yaml"))
    wrong = [value for value in values(override) if value not in options]
    return f"{group}={wrong[0]} is no option of {group}{nearest(wrong[0], options)}" if wrong else None


def packages(chosen: list[Override], folders: list[Path]) -> str | None:
    """The first error of `no_package`."""
    return next((problem for o in chosen if (problem := no_package(o, folders))), None)


def no_package(override: Override, folders: list[Path]) -> str | None:
    """The error if a user's option sets keys of the whole configuration, as its group does, and does not say so."""
    group, line = override.key_or_group, "# @package _global_"
    if override.package or not all(starts_with(path, line) for path in (folders[0] / group).glob("*.yaml")):
        return None
    files = [folder / group / f"{value}.yaml" for folder in folders[1:] for value in values(override)]
    wrong = next((path for path in files if path.is_file() and not starts_with(path, line)), None)
    return f"{wrong} needs `{line}` as its first line, or its keys would be those of {group}." if wrong else None


def starts_with(path: Path, line: str) -> bool:
    """Whether a file starts with this text."""
    return path.read_text().startswith(line)


def no_key(overrides: list[Override], chosen: list[Override], folders: list[Path]) -> str | None:
    """The error if an override sets a key that does not exist under one of the chosen options."""
    adding = [o for o in overrides if o.is_add() or o.is_force_add() or o.is_delete()]
    keys = [o for o in overrides if o not in chosen and o not in adding and re.split("[./]", o.key_or_group)[0] != "hydra"]
    # In a sweep over options, each option is checked once beside the first of the others.
    named = {group_of(o): values(o) for o in chosen if o not in adding and values(o)}
    first = {group: options[0] for group, options in named.items()}
    cells = [first, *({**first, group: option} for group, options in named.items() if keys for option in options[1:])]
    for cell in cells:
        line = [f"{group}={option}" for group, option in cell.items()]
        try:
            base = OmegaConf.to_container(compose([*line, *(o.input_line for o in adding if o.input_line)], folders[1:]))
        except HydraException as error:
            return composition_error(str(error), folders)
        except YAMLError as error:
            return f"a configuration file is no YAML: {' '.join(str(error).split())}"
        swept = [f"{group}={option}" for group, option in cell.items() if len(named[group]) > 1]
        beside = f" under {' '.join(swept)}" if swept else ""
        sentence = next((sentence for o in keys if (sentence := key_error(o, base, beside, folders))), None)
        if sentence:
            return sentence
    return None


def group_of(override: Override) -> str:
    """The group of a choice, with its package where it has one: an option may be chosen in several places."""
    return f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group


def composition_error(message: str, folders: list[Path]) -> str:
    """Hydra's error on composing, as one sentence with the nearest name."""
    if match := re.search(r"Could not find '([\w/]+)/([\w.-]+)'", message):
        group, option = match.groups()
        options = sorted(p.stem for folder in folders for p in (folder / group).glob("*.yaml"))
        return f"override {group}: {option} is no option of {group}{nearest(option, options)}"
    return " ".join(message.split("Available options", maxsplit=1)[0].split())


def values(override: Override) -> list[Any]:
    """The values of an override: one, or those of a sweep; none for a glob or an interval, which others fill in."""
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return []
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def key_error(override: Override, base: Any, beside: str, folders: list[Path]) -> str | None:
    """The error if an override's key is not in the composed configuration."""
    node, path = base, list[str]()
    for part in override.key_or_group.split("."):
        if node is None:
            place = ".".join(path)
            options = owners(override.key_or_group, folders)
            remedy = f"the key belongs to {' or '.join(options[:4])}" if options else f"choose an option for it ({place}=...)"
            return f"{override.input_line}: {place} is null{beside}; {remedy}."
        if isinstance(node, str) and node.startswith("${"):
            place, rest = ".".join(path), override.key_or_group.removeprefix(".".join([*path, ""]))
            return f"{override.input_line}: {place} follows {node}; give all of it, {shell(place, f'{{{rest}: ...}}')}."
        if not isinstance(node, dict):
            return None
        if part not in node:
            if sentence := unlisted(override, node, part) or no_column(override):
                return sentence
            end = hint(override.key_or_group, ".".join(path), node, base, folders)
            return f"{override.input_line} is no key{beside}{end}"
        path.append(part)
        node = node[part]
    return no_column(override) or no_interpolation(override, base)


def unlisted(override: Override, node: dict[str, Any], name: str) -> str | None:
    """The error if a key is an argument of the node's target that no file lists."""
    target = node.get("_target_")
    try:
        accepted = isinstance(target, str) and name in parameters_of(target)
    except ValueError:
        return None
    if accepted and override.key_or_group == f"trainer.{name}" and (message := refusal(name, override.value())):
        return message
    return (
        f"{override.input_line}: {target} takes it, and no file lists it; write +{override.input_line}." if accepted else None
    )


def open_secret(override: Override) -> str | None:
    """The error if an override contains a secret, which would be kept in the shell's history and in Hydra's files."""
    name = secret_name(override.key_or_group, values(override))
    if name is None:
        return None
    return (
        f"{name} on the command line would end in files and in the shell's history; set it as an environment "
        f"variable (WANDB_API_KEY and HF_TOKEN are read as they are), or give '{name}=${{oc.env:NAME}}'."
    )


def secret_name(name: str, value: Any) -> str | None:
    """The name of the first secret with a literal value, in nested values."""
    if isinstance(value, dict):
        return next((inner for k, v in value.items() if (inner := secret_name(f"{name}.{k}", v))), None)
    if isinstance(value, list):
        return next((inner for v in value if (inner := secret_name(name, v))), None)
    return name if is_secret(name) and value not in (None, "") and "${" not in str(value) else None


def unwritable(folder: str) -> str | None:
    """The error if a folder, which need not exist yet, cannot be written."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK):
        return None
    reason = "is not writable" if place.is_dir() else "is a file"
    return f"output_dir={folder} cannot be written ({place} {reason}); choose another folder."
