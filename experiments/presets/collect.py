"""Collect the runs of study=presets: results.csv beside this file, and its rows as the README's table on the terminal.

.venv/bin/python experiments/presets/collect.py outputs/presets
"""

import csv
import sys
from pathlib import Path

from opd_lightning.report.runs import load_study

HERE = Path(__file__).resolve().parent
COLUMNS = (
    "preset",
    "seed",
    "new start",
    "new end",
    "low",
    "high",
    "prior end",
    "first >= 0.5",
    "student tokens",
    "teacher tokens",
)


def main(study: Path) -> None:
    rows = []
    for run in sorted(load_study(study)[0], key=lambda r: (r.name, r.config["seed"])):
        start, end, tokens = run.evaluation["start"], run.evaluation["end"], run.ledger["tokens"]
        interval = run.evaluation["intervals"]["end"]["new/accuracy"]
        half = [row["step"] for row in run.evaluation["history"] if row["new/accuracy"] >= 0.5]
        numbers = [start["new/accuracy"], end["new/accuracy"], interval["low"], interval["high"], end["prior/accuracy"]]
        costs = [tokens.get("student_tokens", 0), tokens.get("teacher_tokens", 0)]
        rows.append([run.name, run.config["seed"], *(f"{n:.3f}" for n in numbers), half[0] if half else "never", *costs])
    with (HERE / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
