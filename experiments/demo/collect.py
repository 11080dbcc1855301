"""Collect the demo's runs: results.csv and forgetting.png beside this file, and matched.csv, the README's fourth column.

    .venv/bin/python experiments/demo/collect.py outputs/demo

matched.csv: for each run, the first evaluation at which the new skill has reached 0.95, and the prior skills there.
"""

import csv
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

from opd_lightning.report.runs import load_study
from opd_lightning.study import report

HERE = Path(__file__).resolve().parent
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's 97.5 % quantile by degrees of freedom."""
COLUMNS = ("step", "new/accuracy", "prior/accuracy", "prior/format")


def main(study: Path) -> None:
    report(study)
    for name in ("results.csv", "forgetting.png"):
        shutil.copy(study / name, HERE / name)
    kept: dict[str, dict[int, float]] = {}
    with (HERE / "matched.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *COLUMNS])
        for run in load_study(study)[0]:
            reached = [row for row in run.evaluation["history"] if row["new/accuracy"] >= 0.95]
            writer.writerow([run.name, run.config["seed"], *((reached[0][c] for c in COLUMNS) if reached else ["never"])])
            if reached:
                kept.setdefault(run.name, {})[run.config["seed"]] = reached[0]["prior/accuracy"]
    compare(kept.get("sdft", {}), kept.get("sft", {}))


def compare(one: dict[int, float], other: dict[int, float]) -> None:
    """Print what SDFT kept of the prior skills beyond SFT, paired by seed, with Student's t interval."""
    pairs = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if len(pairs) - 1 in T95:
        half = T95[len(pairs) - 1] * stdev(pairs) / len(pairs) ** 0.5
        print(
            f"sdft - sft, matched: {mean(pairs):.3f} [{mean(pairs) - half:.3f}, {mean(pairs) + half:.3f}] ({len(pairs)} seeds)"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
