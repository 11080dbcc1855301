"""Columns: which of them plays which part in a row, and which goes unread."""

import math
import string
from collections.abc import Mapping
from typing import Any

from opd_lightning.config.names import nearest
from opd_lightning.tasks.rows import Row

PARTS = ("prompt", "completion", "demonstration", "solution", "answer", "system", "skill", "id")
PROMPTS = ("prompt", "messages", "conversations")
"""Columns that hold the prompt where `columns` does not name one, the first that a row has."""

UNUSED = {
    "tools": "word the tools in the system prompt (task.prepare)",
    "functions": "word the functions in the system prompt (task.prepare)",
    "system": "map it (task.columns.system=system)",
    "images": "models here read text alone",
}
"""Columns of chats that go unread unless `columns` names them, and what to do about it."""


def check_parts(columns: Mapping[str, str]) -> None:
    """Raises ValueError where a column is given to a part that an example does not have."""
    for part, column in columns.items():
        if part == "tools":
            raise ValueError(
                f"task.columns.tools={column}: chats are rendered without descriptions of tools; word them in the system "
                "prompt (task.prepare), and leave this out."
            )
        if part not in PARTS:
            raise ValueError(f"task.columns.{part} is no part of an example{nearest(part, PARTS)}")


def unread(row: Row, columns: Mapping[str, str]) -> list[str]:
    """The columns of `UNUSED` that say something in a row and play no part."""
    said = [column for column in UNUSED if not is_missing(row.get(column))]
    return [column for column in said if not any(used == column or f"{{{column}" in used for used in columns.values())]


def is_missing(value: Any) -> bool:
    """Is a cell empty?"""
    return value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value))


def part_of(row: Row, part: str, column: str, place: str, spared: bool) -> Any:
    """What plays a part in a row: a column's value, or a template filled in; None where a spared one is missing."""
    try:
        if "{" not in column:
            return row[column]
        named = [name for _, name, _, _ in string.Formatter().parse(column) if name]
        if any(row.get(name) is None for name in named if name in row):
            return None  # a template around an empty cell is empty, not the word None
        return column.format(**row)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if spared and isinstance(error, KeyError):
            return None
        if "{" in column:
            columns = ", ".join(row)
            raise ValueError(
                f"{place}: task.columns.{part}={column!r} cannot be filled in ({error} is missing); columns are {columns}."
            ) from error
        raise ValueError(f"{place}: task.columns.{part}={column} is no column{nearest(column, row)}") from error
    except ValueError as error:
        raise ValueError(f"task.columns.{part}={column!r} is no template ({error}); double literal braces.") from error


def prompt_column(row: Row, place: str) -> str:
    """The column that holds the prompt, where nobody says which.

    Raises:
        ValueError: there is none of the usual names.
    """
    found = next((column for column in PROMPTS if column in row), None)
    if found is not None:
        return found
    pair = ""
    if {"chosen", "rejected"} <= set(row):
        pair = " These are preferences, of which no method here learns; task.columns.prompt=chosen imitates the chosen ones."
    raise ValueError(
        f"{place}: task.columns.prompt is missing, and no column is called {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}; columns "
        f"are {', '.join(row)}. Say which holds the prompt (task.columns.prompt=<column>).{pair}"
    )
