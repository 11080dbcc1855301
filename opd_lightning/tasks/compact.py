"""Compact rows: what is kept of a long file's rows until their examples are wanted."""

import pickle
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from opd_lightning.tasks.columns import PROMPTS, unnamed
from opd_lightning.tasks.rows import Row
from opd_lightning.tasks.splits import digest, normal, quoted
from opd_lightning.types import Example

Entry = bytes | Example
"""A pickled (place, row), or an example where the row cannot be pickled."""

AT_ONCE = 20_000
"""Examples that are made when the rows are read; of more, each is made when it is asked for."""

ODD = frozenset("[{") | {character for character in map(chr, range(0x3001)) if character.isspace()}
"""First characters of a text that may be blank or a chat."""

NO_UTF8 = re.compile("[\ud800-\udfff]")


def plain_digest(columns: Mapping[str, str], system: str | None, answer: bool) -> Callable[[Row], bytes | None]:
    """A function to the digest of a plain row's prompt, without an example of it.

    A row is plain if it must give an example of one turn of the user's: its prompt and all its other parts are texts or
    whole numbers of single columns. None is returned for other rows, which may be chats or malformed.

    Args:
        system: the system prompt of all rows.
        answer: whether rows need an answer.
    """
    prompt = columns.get("prompt", PROMPTS[0])
    others, usual = [column for part, column in columns.items() if part != "prompt"], unnamed(columns)
    if "system" in columns or (answer and "answer" not in columns) or any("{" in c for c in (prompt, *others)):
        return lambda row: None
    start = ("[" if not system else f'[["system", {quoted(normal(system))}], ') + '["user", '

    def plain(row: Row) -> bytes | None:
        text = row.get(prompt)
        if "tools" in row or type(text) is not str or not is_plain(text):
            return None
        for column in others + [column for column in usual if column in row]:
            value = row.get(column)
            if type(value) is not int and (type(value) is not str or not is_plain(value)):
                return None
        return digest(f"{start}{quoted(normal(text))}]]")

    return plain


def is_plain(text: str) -> bool:
    """Whether a text is not blank, no chat written as JSON, and can be encoded."""
    return bool(text) and text[0] not in ODD and (text.isascii() or not NO_UTF8.search(text))


def needed(columns: Mapping[str, str], all_cells: bool) -> frozenset[str] | None:
    """The columns that examples are made of; None for all.

    Args:
        all_cells: whether the verifier reads all of a row.
    """
    if all_cells:
        return None
    found = {"tools", *unnamed(columns), *(() if "prompt" in columns else PROMPTS)}
    for column in columns.values():
        found |= {name if column == name else re.split(r"[.[]", name, maxsplit=1)[0] for name in fields(column)}
    return frozenset(found)


def fields(column: str) -> list[str]:
    """The columns of a template, or the column itself."""
    if "{" not in column:
        return [column]
    try:
        return [name for _, name, _, _ in string.Formatter().parse(column) if name]
    except ValueError:
        return []  # no template, which is refused with the first row


def packed(place: str, row: Row, columns: frozenset[str] | None) -> Entry | None:
    """The entry of a row with these columns; None if it cannot be pickled."""
    if columns is not None and not columns.issuperset(row):
        row = {column: value for column, value in row.items() if column in columns}
    try:
        return pickle.dumps((place, row), pickle.HIGHEST_PROTOCOL)
    except Exception:  # objects of own `prepare` functions and of lists in memory raise many kinds
        return None


class LazyExamples(Sequence[Example]):
    """Examples that are made from their rows when they are asked for.

    Args:
        entries: one per example.
        build: makes the example of a place and a row.
    """

    def __init__(self, entries: Sequence[Entry], build: Callable[[str, Row], Example]):
        self.entries, self.build = entries, build

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._made(entry) for entry in self.entries[index]]
        return self._made(self.entries[index])

    def _made(self, entry: Entry) -> Example:
        return entry if isinstance(entry, Example) else self.build(*pickle.loads(entry))


def examples_of(entries: Sequence[Entry], build: Callable[[str, Row], Example]) -> Sequence[Example]:
    """The examples of entries, made at once if they are few."""
    examples = LazyExamples(entries, build)
    return examples if len(examples) > AT_ONCE else list(examples)


def without(examples: Sequence[Example], ids: Mapping[str, Any]) -> Sequence[Example]:
    """The examples whose ids are not among these."""
    if isinstance(examples, LazyExamples):
        kept = [entry for entry, e in zip(examples.entries, examples, strict=True) if e.id not in ids]
        return LazyExamples(kept, examples.build)
    return [e for e in examples if e.id not in ids]
