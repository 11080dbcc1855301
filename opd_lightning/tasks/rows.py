"""Rows of a data set, each with its place ("train.jsonl:7") for errors."""

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
from opd_lightning.utils.in_memory import SCHEME, held, label_of

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
    """All rows with their places, one by one; a .json file is held in memory.

    Args:
        path: a .jsonl, .json, .csv or .parquet file (pkg://package/file in a package), a folder of `datasets`, or a hub id.
        name: the configuration of a hub data set that has several.
        split: of a folder or a hub data set.
        bad: list for a sentence on each malformed row, which is left out; None raises on the first.
        max_rows: number of rows to read, with malformed ones; None reads all.

    Raises:
        ValueError: nothing can be read there, a row is malformed (with file and line), or there are no rows.
    """
    if path.startswith(SCHEME):
        yield from islice(((f"{label_of(path)}:{number}", row) for number, row in enumerate(held(path), start=1)), max_rows)
        return
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
    for row in good_rows(islice(rows, max_rows), bad):
        empty = False
        yield row
    if empty:
        raise ValueError(f"task.path={path} has no rows; an empty file teaches nothing.{f' First: {bad[0]}' if bad else ''}")


def good_rows(rows: Iterator[tuple[str, Row | ValueError]], bad: list[str] | None) -> Iterator[tuple[str, Row]]:
    """The good rows; errors of malformed ones go into `bad`, or the first is raised where it is None."""
    for where, row in rows:
        if not isinstance(row, ValueError):
            yield where, row
        elif bad is None:
            raise row
        else:
            bad.append(str(row))


def from_jsonl(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of a JSONL file, or their errors; blank lines are skipped."""
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
    """The lines of a file with any of the three line ends, one by one."""
    with file.open("rb") as stream:
        for line in stream:
            yield from line.splitlines() if b"\r" in line else (line.removesuffix(b"\n"),)


def from_json(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of a JSON array of objects."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON in UTF-8 ({error}); for one object per line, name it .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no array of objects.")
    for number, row in enumerate(rows, start=1):
        yield place(file, number), checked(row, file, number)


def from_csv(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of a CSV file with a header, or their errors."""
    header: list[str] | None = None
    for line, cells in records(file):
        if isinstance(cells, ValueError):
            yield place(file, line), cells
        elif header is None:
            header = csv_header(cells, f"{file}:{line}")
        else:
            yield place(file, line), csv_row(cells, header, f"{file}:{line}")


def records(file: Path) -> Iterator[tuple[int, list[str] | ValueError]]:
    """The records of a CSV file that are not blank, each with its first line.

    Raises:
        ValueError: a quote is not closed, so that the lines behind it cannot be separated from its text.
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


def csv_header(header: list[str], where: str) -> list[str]:
    """The header; raises ValueError for text that is not UTF-8, and for repeated names (empty ones may repeat)."""
    for column in header:
        if not is_text(column):
            raise ValueError(f"{where}: the header has bytes that are no text ({column!a}); save the file as UTF-8.")
        if column and header.count(column) > 1:
            raise ValueError(f"{where}: the header has the column {column!r} twice; rename one.")
    return header


def csv_row(cells: list[str], header: list[str], where: str) -> Row | ValueError:
    """A row by column, or its error."""
    if len(cells) != len(header):
        wrong = f"none for {header[len(cells)]!r}" if len(cells) < len(header) else f"more behind {header[-1]!r}"
        lines = "".join(cells).count("\n") + 1
        return ValueError(
            f"{where}: has {len(cells)} cells for {len(header)} columns, {wrong}{f' (in {lines} lines)' if lines > 1 else ''}; "
            "quote a text with commas, and close every quote."
        )
    for column, cell in zip(header, cells, strict=True):
        if not is_text(cell):
            return ValueError(f"{where}: the column {column!r} has bytes that are no text ({cell[:60]!a}); save it as UTF-8.")
    return dict(zip(header, cells, strict=True))


def is_text(cell: str) -> bool:
    """Whether a cell is text: surrogates are bytes that are not UTF-8, NUL bytes come from UTF-16 or damaged files."""
    return not NO_TEXT.search(cell)


def from_parquet(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of a parquet table, read by pyarrow."""
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
    """The rows of a folder or hub id, read by Hugging Face's `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"task.path={path} needs a package: pip install 'opd-lightning[datasets]'.") from error
    is_saved = any((Path(path) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    datasets.disable_progress_bars()
    try:
        if is_saved:
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
    """A row's place: file name and line."""
    return f"{file.name}:{number}"


def checked(row: Any, file: Path, number: int) -> Row | ValueError:
    """A JSON value that is a row, or its error."""
    if not isinstance(row, dict):
        return ValueError(f'{file}:{number}: is {type(row).__name__}, not an object such as {{"prompt": "..."}}.')
    for column in row:
        if not (column.isascii() and column.isprintable()) and not is_text(column):
            return ValueError(f"{file}:{number}: the name of column {column!a} is no text; rename it.")
    return row


def check_utf8(value: Any, where: str) -> Any:
    """The value itself, if its text can be encoded as UTF-8: an escape in JSON may be half of a surrogate pair.

    Raises:
        ValueError: it cannot, and tokenizers would fail.
    """
    try:
        plain = isinstance(value, str)
        (value if plain else json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no text in UTF-8 ({error}); mend the row.") from error
    return value


def text(value: Any, part: str, place: str) -> str | None:
    """A cell as text; None for empty cells and blanks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{place}: the {part} is {type(value).__name__}, not text; task.prepare can reshape rows.")
    return value if value.strip() else None
