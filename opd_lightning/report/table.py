"""The table: one row per cell (a method with its options), the mean and the range over its seeds."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from opd_lightning.report.runs import Run

COSTS = {"student_tokens": "student tokens", "teacher_tokens": "teacher tokens", "seconds": "seconds"}


def metrics(run: Run) -> dict[str, float]:
    """Evaluation at the end and costs; details of single skills ("prior/sort/accuracy") are left to evaluation.json."""
    end = {k: v for k, v in run.evaluation["end"].items() if k != "step" and k.count("/") == 1}
    tokens = {k: float(run.ledger["tokens"].get(k, 0)) for k in ("student_tokens", "teacher_tokens")}
    return end | {"updates": float(run.ledger["steps"])} | tokens | {"seconds": run.seconds}


def by_cell(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs grouped by cell, seeds in order."""
    cells: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.name, r.cell, r.config["seed"])):
        cells[run.cell].append(run)
    return dict(cells)


def summarise(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: means, with the range over seeds in brackets where there are several."""
    names = list(metrics(runs[0]))
    start = runs[0].evaluation["start"]
    rows = [["start model", "", *(shown([start[n]], n) if n in start else "" for n in names)]]
    for cell in by_cell(runs).values():
        values = [metrics(run) for run in cell]
        rows.append([cell[0].name, str(len(cell)), *(shown([v[n] for v in values], n) for n in names)])
    return ["method", "seeds", *(COSTS.get(n, n) for n in names)], rows


def shown(values: list[float], name: str) -> str:
    """A mean, and [lowest, highest] if the values differ."""
    digits = "{:,.0f}" if name in COSTS or name == "updates" else "{:.3f}"
    middle = digits.format(mean(values))
    low, high = digits.format(min(values)), digits.format(max(values))
    return middle if low == high or name in COSTS else f"{middle} [{low}, {high}]"


def print_table(runs: list[Run]) -> None:
    """The table on the terminal, a column per method: metrics are many, methods few."""
    header, rows = summarise(runs)
    table = Table(title=f"study {runs[0].config['study']['name']}: mean [range over seeds]", title_justify="left")
    for name, *_ in [header, *rows]:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for line in list(zip(header, *rows, strict=True))[1:]:
        table.add_row(*line)
    Console().print(table)


def write_csv(runs: list[Run], path: Path) -> None:
    """results.csv: one row per run, nothing averaged."""
    names = list(metrics(runs[0]))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "method", "seed", *names])
        for run in sorted(runs, key=lambda r: (r.name, r.cell, r.config["seed"])):
            values = metrics(run)
            writer.writerow([run.cell, run.name, run.config["seed"], *(f"{values[n]:.6g}" for n in names)])
