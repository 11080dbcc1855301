"""Rows of a data set, each with the place it stands at ("train.jsonl:7"), for errors that can be acted on."""

import csv
import json
import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from opd_lightning.config.names import nearest, packaged
from opd_lightning.models import stand_in

Row = dict[str, Any]
FILES = (".jsonl", ".json", ".csv", ".parquet")
BATCH = 1024
"""Rows of a parquet file that are in memory at a time."""

NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read_rows(path: str, name: str | None = None, split: str = "train", bad: list[str] | None = None) -> list[tuple[str, Row]]:
    """All rows with their places, in a list; see `iter_rows`."""
    return list(iter_rows(path, name, split, bad))


def iter_rows(
    path: str, name: str | None = None, split: str = "train", bad: list[str] | None = None, max_rows: int | None = None
) -> Iterator[tuple[str, Row]]:
    """All rows with their places, one after the other; of a .json file all are in memory at once.

    Args:
        path: a .jsonl, .json, .csv or .parquet file (pkg://package/file in a package), a folder that
            `datasets` saved or can read, or a hub id.
        name: the configuration of a hub data set that has several.
        split: of a folder or a hub data set.
        bad: takes a sentence for each malformed row, which is then left out; None refuses the first.
        max_rows: nothing behind so many rows, malformed ones among them, is read; None reads all.

    Raises:
        ValueError: nothing can be read there, a row is malformed (with file and line), or there are no rows.
    """
    if path.startswith(stand_in.SCHEME):
        made = stand_in.rows(path.removeprefix(stand_in.SCHEME))
        yield from islice(((f"{path}:{number}", row) for number, row in enumerate(made, start=1)), max_rows)
        return
    file = Path(packaged(path))
    if file.suffix not in FILES and file.is_file():
        raise ValueError(f"task.path={path} is a file of no known kind{nearest(file.suffix, FILES)}")
    if file.suffix not in FILES and get_close_matches(file.suffix, FILES, n=1):
        raise ValueError(f"task.path={path} does not exist and is of no known kind{nearest(file.suffix, FILES)}")
    if file.suffix in FILES:
        if not file.is_file():
            raise ValueError(f"task.path={path} does not exist; give a file, a folder or a hub id.")
        rows: Iterator[tuple[str, Row | ValueError]] = READERS[file.suffix](file)
    else:
        rows = from_datasets(path, name, split)
    empty = True
    for row in kept(islice(rows, max_rows), bad):
        empty = False
        yield row
    if empty:
        raise ValueError(f"task.path={path} has no rows; an empty file teaches nothing.{f' First: {bad[0]}' if bad else ''}")


def kept(read: Iterator[tuple[str, Row | ValueError]], bad: list[str] | None) -> Iterator[tuple[str, Row]]:
    """The good rows; of the bad ones a sentence each, or the first one's error where `bad` is None."""
    for where, row in read:
        if not isinstance(row, ValueError):
            yield where, row
        elif bad is None:
            raise row
        else:
            bad.append(str(row))


def from_jsonl(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """One JSON object per line, or what is wrong with it; blank lines are skipped."""
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield (
                place(file, number),
                ValueError(f"{file}:{number}: not JSON in UTF-8 ({error}); each line must be one object."),
            )
            continue
        yield place(file, number), checked(row, file, number)


def lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, whichever of the three line ends it has, one after the other."""
    with file.open("rb") as stream:
        for line in stream:
            yield from line.splitlines() if b"\r" in line else (line.removesuffix(b"\n"),)


def from_json(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """A JSON array of objects."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON in UTF-8 ({error}); for one object per line, name it .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no array of objects.")
    for number, row in enumerate(rows, start=1):
        yield place(file, number), checked(row, file, number)


def from_csv(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """A header line and as many cells in every row, or what is wrong with it."""
    header: list[str] | None = None
    for line, cells in records(file):
        if isinstance(cells, ValueError):
            yield place(file, line), cells
        elif header is None:
            header = named(cells, f"{file}:{line}")
        else:
            yield place(file, line), celled(cells, header, f"{file}:{line}")


def records(file: Path) -> Iterator[tuple[int, list[str] | ValueError]]:
    """The records of a CSV file that are not blank, each with the line that it begins in.

    Raises:
        ValueError: a quote is not closed in its line, and the lines behind it cannot be told from its text.
    """
    csv.field_size_limit(2**31 - 1)
    # Spreadsheets write a byte-order mark; bytes that are not UTF-8 stay in their cells, which have a row and a column.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.reader(stream, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                wrong = ValueError(f"{file}:{first}: no CSV ({error}); close the quote that opens here, double inner ones.")
                if reader.line_num > first:
                    raise wrong from error
                yield first, wrong
                continue
            if cells:
                yield first, cells


def named(header: list[str], where: str) -> list[str]:
    """The header, if it is one: UTF-8, and no column's name twice (spreadsheets leave several empty ones)."""
    for column in header:
        if not clean(column):
            raise ValueError(f"{where}: the header has bytes that are no text ({column!a}); save the file as UTF-8.")
        if column and header.count(column) > 1:
            raise ValueError(f"{where}: the header has the column {column!r} twice; rename one.")
    return header


def celled(cells: list[str], header: list[str], where: str) -> Row | ValueError:
    """A row by column, or which column is at fault."""
    if len(cells) != len(header):
        wrong = f"none for {header[len(cells)]!r}" if len(cells) < len(header) else f"more behind {header[-1]!r}"
        lines = "".join(cells).count("\n") + 1
        return ValueError(
            f"{where}: has {len(cells)} cells for {len(header)} columns, {wrong}{f' (in {lines} lines)' if lines > 1 else ''}; "
            "quote a text with commas, and close every quote."
        )
    for column, cell in zip(header, cells, strict=True):
        if not clean(cell):
            return ValueError(f"{where}: the column {column!r} has bytes that are no text ({cell[:60]!a}); save it as UTF-8.")
    return dict(zip(header, cells, strict=True))


def clean(cell: str) -> bool:
    """Is it text? Surrogates stand for bytes that are not UTF-8; NUL bytes are UTF-16, or a damaged file."""
    return not NO_TEXT.search(cell)


def from_parquet(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """A parquet table, through pyarrow."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"task.path={file} needs a package: pip install 'opd-lightning[datasets]'.") from error
    try:
        with parquet.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches(BATCH) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield place(file, number), row
    except Exception as error:  # a damaged file raises many kinds, OSError and the library's own among them
        raise ValueError(f"{file}: no parquet table ({' '.join(str(error).split())}); write or copy it again.") from error


def from_datasets(path: str, name: str | None, split: str) -> Iterator[tuple[str, Row | ValueError]]:
    """A folder or a hub id, through Hugging Face's `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"task.path={path} needs a package: pip install 'opd-lightning[datasets]'.") from error
    saved = any((Path(path) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    datasets.disable_progress_bars()
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the library raises many kinds, its own among them
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"task.path={path} (name={name}, split={split}) could not be read ({first}); give a file, a folder or a hub id, "
            "and check task.name and task.split."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{Path(path).name}[{split}]:{number}", row


READERS = {".jsonl": from_jsonl, ".json": from_json, ".csv": from_csv, ".parquet": from_parquet}


def place(file: Path, number: int) -> str:
    """How a row is called: file name and line."""
    return f"{file.name}:{number}"


def checked(row: Any, file: Path, number: int) -> Row | ValueError:
    """A JSON value that is a row, or what it is instead."""
    if not isinstance(row, dict):
        return ValueError(f'{file}:{number}: is {type(row).__name__}, not an object such as {{"prompt": "..."}}.')
    for column in row:
        if not (column.isascii() and column.isprintable()) and not clean(column):
            return ValueError(f"{file}:{number}: the name of column {column!a} is no text; rename it.")
    return row


def written(value: Any, where: str) -> Any:
    """The value itself, if its text can be written as UTF-8: an escape in JSON may be one half of a character.

    Raises:
        ValueError: it cannot; tokenizers would fall over it.
    """
    try:
        plain = isinstance(value, str)
        (value if plain else json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no text in UTF-8 ({error}); mend the row.") from error
    return value


def text(value: Any, part: str, place: str) -> str | None:
    """A cell as text; nothing and blanks are None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{place}: the {part} is {type(value).__name__}, not text; task.prepare can reshape rows.")
    return value if value.strip() else None
