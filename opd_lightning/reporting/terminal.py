"""Terminal report: a row per method with the headline numbers, then a line per method with its difference from the baseline.

A narrow terminal loses ranges first; then headers and names are wrapped. Numbers are never cut.
"""

import shutil
from collections.abc import Iterable
from textwrap import wrap

from opd_lightning.reporting.answer import reached
from opd_lightning.reporting.compare import ONE_SEED, Compared, difference_text
from opd_lightning.reporting.headline import COSTS, Line, chosen, lines, more_seeds, one_seed, seed_counts
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels, metrics

WIDTH = 100
"""Width in characters where the output is no terminal and COLUMNS is not set."""
GAP = "  "
LEAST, ROOM = 12, 24
"""Least width of a method's name, and the width that ranges leave to it, in characters."""

Row = list[str]


def columns() -> int:
    """Width of the terminal in characters."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def terminal(runs: list[Run], compared: Compared, left_out: list[str], width: int) -> list[str]:
    """All lines of the terminal's report."""
    target = any(run.censored for run in runs)
    header = ["method", *(["target met"] if target else []), *(h.label for h in chosen(runs)), *COSTS.values()]
    short = lines(runs)
    below = [] if one_seed(runs) else differences(runs, compared, target)
    cells = [row for row in below if len(row) == len(header)]
    ranged = fitting(header, short, cells, width)
    body = texts(short, ranged, target)
    widths = narrowed(header, [*body, *cells], width)
    printed = [line for row in [header, *body] for line in laid_out(row, widths)]
    printed += [line for sentence in legend(runs, compared, bool(ranged)) for line in wrap(sentence, width)]
    for row in below:
        printed += laid_out(row, widths) if row in cells else wrap(": ".join(row), width)
    more = f" ({len(left_out) - 1} more such notes in report.html)" if len(left_out) > 1 else ""
    return printed + (wrap(f"note: {left_out[0]}{more}", width) if left_out else [])


def differences(runs: list[Run], compared: Compared, target: bool) -> list[Row]:
    """A row of differences from the baseline per method, or its name and why it was not compared."""
    if compared.baseline in compared.reasons:
        return []
    names, rows = [*(h.name for h in chosen(runs)), *COSTS], []
    for label in labels(runs):
        if label in compared.reasons:
            rows.append([label, f"not compared, {compared.reasons[label]}"])
        elif label != compared.baseline:
            cells = [difference_text(runs, compared, label, name) for name in names]
            alone = set(filter(None, cells)) == {ONE_SEED}
            row = [f"one seed in common with {compared.baseline}, which decides nothing"] if alone else cells
            rows.append([label, *([""] if target and not alone else []), *row])
    return rows


def legend(runs: list[Run], compared: Compared, ranged: bool) -> list[str]:
    """Sentences that explain the numbers above and the differences below; with one seed, how to add more."""
    teacher = any(metrics(run).get("teacher_training") for run in runs)
    if one_seed(runs):
        text = f"One seed decides nothing. Add seeds to the same command: {more_seeds(runs)}"
        return [text, "FLOPs do not count the training of the teacher."] if teacher else [text]
    text = f"Mean{' [range]' if ranged else ''} of {seed_counts(runs)} seeds"
    text += ", FLOPs without teacher training." if teacher else "."
    if compared.baseline in compared.reasons:
        sentence = compared.sentences[-1]
        if not reached(runs):  # another baseline would not help
            sentence = sentence.split(";")[0]
        return [text, f"{sentence[0].upper()}{sentence[1:]}."]
    return [text + (f" Difference from {compared.baseline}, at 95 %:" if len(labels(runs)) > 1 else "")]


def fitting(header: Row, short: list[Line], below: list[Row], width: int) -> set[int]:
    """The indices of number columns whose ranges fit; the second column is tried first."""
    fitted: set[int] = set()
    first = len(header) - len(short[0].cells)
    for column in sorted(range(len(short[0].cells)), key=lambda i: i != 1):
        widths = needed([header, *texts(short, fitted | {column}, first > 1), *below])
        if any(line.cells[column][1] for line in short) and total([min(ROOM, widths[0]), *widths[1:]]) <= width:
            fitted.add(column)
    return fitted


def texts(short: list[Line], ranged: set[int], target: bool) -> list[Row]:
    """The rows as text: means right-aligned, with the range in the columns `ranged`."""
    most = [max(len(mean) for mean, _ in cells) for cells in zip(*(line.cells for line in short), strict=True)]
    rows = []
    for line in short:
        cells = [f"{mean:>{most[i]}} {spread if i in ranged else ''}".rstrip() for i, (mean, spread) in enumerate(line.cells)]
        rows.append([line.label, *([line.met] if target else []), *cells])
    return rows


def needed(rows: Iterable[Row]) -> list[int]:
    """The width of each column."""
    return [max(map(len, cells)) for cells in zip(*rows, strict=True)]


def total(widths: list[int]) -> int:
    """The width of a row."""
    return sum(widths) + len(GAP) * (len(widths) - 1)


def narrowed(header: Row, rows: list[Row], width: int) -> list[int]:
    """Widths that fit, if need be with headers broken between words, and with names in what the numbers leave."""
    widths = needed([header, *rows])
    if total([min(ROOM, widths[0]), *widths[1:]]) > width:
        widths = [max(n, *map(len, name.split())) for n, name in zip(needed(rows), header, strict=True)]
    rest = total(widths) - widths[0]
    return [min(widths[0], max(LEAST, width - rest)), *widths[1:]]


def laid_out(row: Row, widths: list[int]) -> list[str]:
    """A row as lines: one, or several where a cell is wider than its column."""
    parts = [[cell] if len(cell) <= n else wrap(cell, n) for cell, n in zip(row, widths, strict=True)]
    height = max(map(len, parts))
    filled = [[f"{text:<{n}}" for text in part + [""] * (height - len(part))] for part, n in zip(parts, widths, strict=True)]
    return [GAP.join(line).rstrip() for line in zip(*filled, strict=True)]
