"""Columns: the parts of an example that they hold, and columns that are not read."""

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.config.names import nearest
from opd_lightning.tasks.rows import Row

PARTS = ("prompt", "completion", "demonstration", "solution", "answer", "system", "skill", "id", "tools")
PROMPTS = ("prompt", "messages", "conversations", "question")
"""Columns for the prompt where `columns` names none; the first that a row has is used."""
UNNAMED = ("completion", "answer")
"""Parts that the column of the same name plays where `columns` names neither them nor the prompt."""

UNUSED = {
    "functions": "map them (task.columns.tools=functions)",
    "system": "map it (task.columns.system=system)",
    "images": "models here read text alone",
    "weight": "examples count alike: leave out those of weight 0 (task.prepare)",
    "completion_mask": "all of a reply is trained",
    "assistant_masks": "all of a reply is trained",
    "loss_mask": "all of a reply is trained",
}
"""Columns of chats that are not read unless `columns` names them, and the remedies."""


def check_parts(columns: Mapping[str, str]) -> None:
    """Raises ValueError if `columns` names a part that examples lack."""
    for part in columns:
        if part not in PARTS:
            raise ValueError(f"task.columns.{part} is no part of an example{nearest(part, PARTS)}")


def check_id(own: str, place: str, column: str | None, places: dict[str, str]) -> None:
    """Check that no row before has the id of the row at a place; file and line are unique without a column.

    Raises:
        ValueError: one has it.
    """
    if own in places:
        raise ValueError(
            f"{place}: task.columns.id={column} is {own!r} as in {places[own]}; give every row another, or "
            "task.columns.id=null calls rows by file and line."
        )
    if column is not None:
        places[own] = place


def no_rows(bad: Sequence[str] | None) -> str:
    """A sentence on why no row is left."""
    return f"task.bad_rows=skip leaves no row, the first for this: {bad[0]}" if bad else "task.prepare leaves no row."


def unread(row: Row, columns: Mapping[str, str]) -> list[str]:
    """The columns of `UNUSED` that have a value in a row and are not read."""
    filled = [column for column in UNUSED if not is_missing(row.get(column))]
    return [column for column in filled if not any(used == column or f"{{{column}" in used for used in columns.values())]


def cells(row: Row) -> dict[str, str]:
    """The texts and numbers of a row, as text by column."""
    return {column: str(value) for column, value in row.items() if isinstance(value, str | int | float | bool)}


def is_missing(value: Any) -> bool:
    """Whether a cell is empty."""
    return value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value))


def part_of(row: Row, part: str, column: str, place: str, optional: bool) -> Any:
    """The value of an example's part: a column's cell, or a filled template; None where an optional one is missing."""
    try:
        if "{" not in column:
            return row[column]
        named = [name for _, name, _, _ in string.Formatter().parse(column) if name]
        if any(row.get(name) is None for name in named if name in row):
            return None  # a template around an empty cell is empty, not the word None
        return column.format(**row)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if optional and isinstance(error, KeyError):
            return None
        if "{" in column:
            columns = ", ".join(row)
            raise ValueError(
                f"{place}: task.columns.{part}={column!r} cannot be filled in ({error} is missing); columns are {columns}."
            ) from error
        raise ValueError(f"{place}: task.columns.{part}={column} is no column{nearest(column, row)}") from error
    except ValueError as error:
        raise ValueError(f"task.columns.{part}={column!r} is no template ({error}); double literal braces.") from error


def unnamed(columns: Mapping[str, str]) -> list[str]:
    """The parts besides the prompt for which a column of the usual name is used."""
    return [] if {"prompt", *UNNAMED} & set(columns) else list(UNNAMED)


def all_columns(row: Row, columns: Mapping[str, str], place: str) -> dict[str, str]:
    """The column of each part of a row's example: those of `columns`, and for other parts those of the usual names.

    Of rows with `question` and `answer` and no completion the answer is the completion too. A cell that is no text, such as a
    list of answers, is no answer.

    Raises:
        ValueError: no column is the prompt's.
    """
    found = {"prompt": prompt_column(row, place), **columns} if "prompt" not in columns else dict(columns)
    usual = {part: part for part in unnamed(columns) if not is_missing(row.get(part))}
    if not isinstance(row.get("answer"), str | int | float):
        usual.pop("answer", None)
    if found["prompt"] in ("messages", "conversations") or ends_in_reply(row.get(found["prompt"])):
        usual.pop("completion", None)  # a chat ends in its own
    if found["prompt"] == "question" and "answer" in usual:
        usual.setdefault("completion", "answer")
    return found | usual


def ends_in_reply(cell: Any) -> bool:
    """Whether a cell is a chat whose last turn is a reply."""
    last = cell[-1] if isinstance(cell, list) and cell else None
    return isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt")


def mapping(row: Row, columns: Mapping[str, str], place: str) -> str | None:
    """A sentence on which columns of a row were found by their names; None if `columns` names all that are used."""
    found = {part: column for part, column in all_columns(row, columns, place).items() if part not in columns}
    if not found:
        return None
    parts = ", ".join(f"{part}: {column}" for part, column in found.items())
    return f"columns by their names: {{{parts}}}; 'task.columns={{<part>: <column>, ...}}' sets others."


def prompt_column(row: Row, place: str) -> str:
    """The column of the prompt, where `columns` names none.

    Raises:
        ValueError: there is none of the usual names.
    """
    column = next((name for name in PROMPTS if name in row), None)
    if column is not None:
        return column
    pair = ""
    if {"chosen", "rejected"} <= set(row):
        pair = " These are preferences, of which no method here learns; task.columns.prompt=chosen imitates the chosen ones."
    raise ValueError(
        f"{place}: task.columns.prompt is missing, and no column is called {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}; columns "
        f"are {', '.join(row)}. Set it (task.columns.prompt=<column>).{pair}"
    )
