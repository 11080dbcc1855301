"""Columns that are no part of an example, and texts with a `${...}` that no key fills: sentences in place of Hydra's."""

import re
from typing import Any

from hydra.core.override_parser.types import Override

from opd_lightning.config.grammar import parse, parses, quoted, shell

NO_COLUMNS = {
    "functions": "the part for schemas of functions is called tools; write task.columns.tools=<column>.",
    "images": "models here read text alone; describe them in the prompt (task.prepare), and leave this out.",
}
"""Columns that are no part of an example, with the reason and the remedy."""


def no_column(override: Override) -> str | None:
    """The error if an override names a column that no example has a part for, alone or in a mapping of columns."""
    place, _, column = override.key_or_group.rpartition(".")
    names = [column] if place == "task.columns" else []
    if override.key_or_group == "task.columns" and not override.is_sweep_override() and isinstance(override.value(), dict):
        names = list(override.value())  # type: ignore[arg-type]
    name = next((name for name in names if name in NO_COLUMNS), None)
    shown = override.input_line if place == "task.columns" else f"{override.input_line}: {name}"
    return f"{shown}: {NO_COLUMNS[name]}" if name is not None else None


def column_error(word: str) -> str | None:
    """The error of `no_column` for an override as text."""
    return no_column(parse(word)) if word.lstrip("+").startswith("task.columns=") and parses(word) else None


def no_interpolation(override: Override, base: Any) -> str | None:
    """The error if a text has a `${key}` for which the configuration has no key."""
    value = None if override.is_delete() or override.is_sweep_override() else override.value()
    if not isinstance(value, str):
        return None
    for match in re.finditer(r"(?<!\\)\$\{(\w[\w.]*)\}", value):
        if match[1].split(".")[0] not in base:
            literal = shell(override.key_or_group, quoted(value.replace(match[0], f"\\{match[0]}")))
            return f"{override.input_line}: there is no key {match[1]} to fill in {match[0]} with; a literal one is {literal}."
    return None
