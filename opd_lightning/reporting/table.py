"""All numbers of a study: per run in results.csv, per cell (a method with its options) as means and ranges over seeds."""

import csv
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from opd_lightning.config.labels import distinguished
from opd_lightning.evaluation import headlines
from opd_lightning.reporting.runs import Run
from opd_lightning.runs.identity import HASHED

COSTS = {
    "student_tokens": "student tokens",
    "teacher_tokens": "teacher tokens",
    "flops": "FLOPs",
    "teacher_training": "FLOPs of training the teacher",
    "seconds": "seconds",
    "peak_mib": "peak memory, MiB",
}


def metrics(run: Run) -> dict[str, float]:
    """Evaluation on test at the end, and costs; without single skills ("prior/sort/accuracy")."""
    end = {name: run.evaluation["end"][name] for name in headlines(run.evaluation["end"])}
    costs = {k: float(run.ledger["tokens"].get(k, 0)) for k in ("student_tokens", "teacher_tokens")}
    costs["flops"] = float(sum(run.ledger["flops"].values()))
    if run.ledger.get("teacher_training") is not None:
        costs["teacher_training"] = float(run.ledger["teacher_training"])
    memory = run.ledger["peak_memory"]
    costs |= {"seconds": run.seconds, "peak_mib": memory.get("gpu_mib", memory["resident_mib"])}
    return end | {"updates": float(run.ledger["steps"])} | costs


def by_cell(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs grouped by cell, seeds in order."""
    cells: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.name, r.cell, r.seed)):
        cells[run.cell].append(run)
    return dict(cells)


def labels(runs: list[Run]) -> dict[str, list[Run]]:
    """Cells by a readable name: the method's, with what differs where several cells share it, such as "sdft, lr 1e-4"."""
    cells = by_cell(runs)
    named: dict[str, str] = {}
    for name in dict.fromkeys(cell[0].name for cell in cells.values()):
        folders = [folder for folder, cell in cells.items() if cell[0].name == name]
        labels = distinguished(name, [identity(cells[folder][0]) for folder in folders])
        unique = {folder: labels[i] if labels.count(labels[i]) == 1 else folder for i, folder in enumerate(folders)}
        named |= dict(sorted(unique.items(), key=lambda item: numeric(item[1])))
    return {label: cells[folder] for folder, label in named.items()}


def numeric(label: str) -> list[tuple[float, str]]:
    """A key that sorts labels by the numbers in them: lr 5e-5 before lr 1e-4."""
    words = label.replace(",", "").split()
    return [(float(word), "") if re.fullmatch(r"[\d.]+(e-?\d+)?", word) else (math.inf, word) for word in words]


def identity(run: Run) -> dict[str, Any]:
    """What a run's configuration says about its result; paths without the seed."""
    kept = {key: run.config[key] for key in HASHED if key in run.config}
    kept["trainer"] = {key: run.config["trainer"].get(key) for key in ("precision", "max_steps", "max_epochs")}
    return json.loads(re.sub(r"seed-\d+", "seed-*", json.dumps(kept)))


def names_of(runs: list[Run]) -> list[str]:
    """Every number that any run has: evaluations first, costs last."""
    names = list(dict.fromkeys(name for run in runs for name in metrics(run)))
    last = ["updates", *COSTS]
    return [name for name in names if name not in last] + [name for name in last if name in names]


def summarise(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: means, with the range over seeds in brackets where there are several."""
    names = names_of(runs)
    start = runs[0].evaluation["start"]
    rows = [["start model", "", *(shown([start[n]], n) if n in start else "" for n in names)]]
    for label, cell in labels(runs).items():
        values = [metrics(run) for run in cell]
        missed = sum(run.censored for run in cell)
        seeds = f"{len(cell)}" + (f", {missed} censored" if missed else "")
        rows.append([label, seeds, *(shown([v[n] for v in values if n in v], n) for n in names)])
    return ["method", "seeds", *(COSTS.get(n, n) for n in names)], rows


def spread(values: list[float], name: str) -> tuple[str, str]:
    """A mean, and "[lowest, highest]" where the values differ and are no cost; both empty without values."""
    if not values:
        return "", ""
    if name in COSTS and not any(values):
        return "0", ""
    digits = "{:.2e}" if name in ("flops", "teacher_training") else "{:,.0f}" if name in (*COSTS, "updates") else "{:.3f}"
    low, high = digits.format(min(values)), digits.format(max(values))
    return digits.format(mean(values)), "" if low == high or name in COSTS else f"[{low}, {high}]"


def shown(values: list[float], name: str) -> str:
    """The mean and the range in one text."""
    return " ".join(spread(values, name)).strip()


def write_csv(runs: list[Run], path: Path) -> None:
    """Write results.csv: one row per run, nothing averaged."""
    names = names_of(runs)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "label", "method", "seed", "lr", "ended_by", *names])
        for label, run in ((label, run) for label, cell in labels(runs).items() for run in cell):
            values = metrics(run)
            fixed = [run.cell, label, run.name, run.seed, run.config["optim"]["lr"], run.status["ended_by"]]
            writer.writerow([*fixed, *(f"{values[n]:.6g}" if n in values else "" for n in names)])
