"""Collect the demo's runs: results.csv and forgetting.png beside this file, and matched.csv, the README's fourth column.

    .venv/bin/python experiments/demo/collect.py outputs/demo

matched.csv: for each run, the first evaluation at which the new skill has reached 0.95, and the prior skills there.
"""

import csv
import shutil
import sys
from pathlib import Path

from opd_lightning.report.runs import load_study
from opd_lightning.study import report

HERE = Path(__file__).resolve().parent
COLUMNS = ("step", "new/accuracy", "prior/accuracy", "prior/format")


def main(study: Path) -> None:
    report(study)
    for name in ("results.csv", "forgetting.png"):
        shutil.copy(study / name, HERE / name)
    with (HERE / "matched.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *COLUMNS])
        for run in load_study(study)[0]:
            reached = [row for row in run.evaluation["history"] if row["new/accuracy"] >= 0.95]
            writer.writerow([run.name, run.config["seed"], *((reached[0][c] for c in COLUMNS) if reached else ["never"])])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
