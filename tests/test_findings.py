"""What the experiments' texts say is what their CSV files give: every interval and every line of a table."""

import importlib
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import matplotlib
import pytest

from experiments.grid import Bench

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/run.py"))
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
INTERVAL = re.compile(rf"(?:(?<![\w.])({NUMBER})\s+)?\[({NUMBER}),\s*({NUMBER})\]")
"""What an interval looks like, behind its mean or alone."""


@cache
def told(folder: str) -> str:
    """All that an experiment tells of its CSV files, without drawing."""
    tell = importlib.import_module(f"experiments.{folder}.run").tell
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        tell(Bench(ROOT / "experiments" / folder))
    return said.getvalue()


def numbers(text: str) -> list[str]:
    """Decimal numbers of a text, as they are written."""
    return [n.replace(",", "") for n in re.findall(rf"(?<![\w.]){NUMBER}(?![\w.]*\w)", text)]


def alike(said: str, exact: str) -> bool:
    """Is a number what another one is when it is rounded (once more)?"""
    half = [0.5 * 10 ** -len(n.partition(".")[2].partition("e")[0]) for n in (said, exact)]
    scale = [10 ** int(n.partition("e")[2] or 0) for n in (said, exact)]
    return abs(float(said) - float(exact)) <= 1.001 * sum(h * s for h, s in zip(half, scale, strict=True))


def intervals(text: str) -> list[list[str]]:
    """[mean or "", low, high] of each interval; [0, 1], an accuracy's range, is none."""
    found = [[n.replace(",", "") for n in match] for match in INTERVAL.findall(text)]
    return [interval for interval in found if interval[1:] != ["0", "1"]]


def missing(text: str, said: str) -> Iterator[str]:
    """Intervals of a text that are not among those that are told."""
    known = intervals(said)
    for mean, low, high in intervals(text):
        if not any(alike(low, a) and alike(high, b) and (not mean or not m or alike(mean, m)) for m, a, b in known):
            yield f"{mean} [{low}, {high}]"


def untold(text: str, said: str) -> Iterator[str]:
    """Lines of tables that no told line has: the name in code that they begin with, and their numbers in this order."""
    lines = [(line, numbers(line)) for line in said.splitlines()]
    for line in text.splitlines():
        name = next(iter(re.findall(r"`[^`]+`", line)), "")
        mine = numbers(line) if line.startswith("|") else []
        if mine and not any(name in told and within(mine, other) for told, other in lines):
            yield line


def within(mine: list[str], other: list[str]) -> bool:
    """Are these numbers among the others, in the same order?"""
    rest = iter(other)
    return all(any(alike(n, o) for o in rest) for n in mine)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_finding_says_what_its_csv_files_give(folder):
    text = (ROOT / "experiments" / folder / "README.md").read_text()
    assert not list(missing(text, told(folder))) and not list(untold(text, told(folder)))
    assert "\N{MINUS SIGN}" not in text, "a minus that the test does not read"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_table_has_rows(folder):
    lines = [*(ROOT / "experiments" / folder / "README.md").read_text().splitlines(), ""]
    rules = [at for at, line in enumerate(lines) if re.fullmatch(r"\|[ -]*-[ -]*(\|[ -]+)*\|", line)]
    assert rules and all(lines[at - 1].startswith("|") and lines[at + 1].startswith("|") for at in rules)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_row_of_the_index_says_what_its_folder_says(folder):
    rows = (ROOT / "experiments" / "README.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith("| [") and f"]({folder}/README.md)" in row]
    assert not list(missing(row, told(folder)))


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_a_page_that_quotes_findings_says_what_they_say(page):
    assert not list(missing((ROOT / page).read_text(), "\n".join(map(told, FOLDERS))))


def test_what_is_not_told_is_seen():
    said = "| `a` | +0.123 [+0.101, +0.145] | 12.0 |\nx 7.28 [1.26, 41.97]"
    assert not list(missing("0.12 [0.10, 0.15], 7.3 [1.3, 42], or [0.101, 0.145] and [0, 1]", said))
    assert list(missing("0.14 [0.10, 0.15] and 0.123 [0.111, 0.145]", said)) == ["0.14 [0.10, 0.15]", "0.123 [0.111, 0.145]"]
    assert not list(untold("| b | 0.123 | 12 |", said)) and list(untold("| b | 12 | 0.123 |", said))
    assert not list(untold("| `a` | 0.123 |", said)) and list(untold("| `b` | 0.123 |", said))
