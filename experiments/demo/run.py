"""Copy the demo study's tables and figures here, and print the README's table.

.venv/bin/python experiments/demo/collect.py outputs/demo
"""

import csv
import shutil
import sys
from pathlib import Path
from statistics import mean

from opd_lightning.report.runs import load_study
from opd_lightning.report.table import labels, metrics
from opd_lightning.study import report

HERE = Path(__file__).resolve().parent
COLUMNS = (
    "new/accuracy",
    "prior/accuracy",
    "prior/format",
    "robust/mean",
    "robust/worst",
    "updates",
    "student_tokens",
    "flops",
    "seconds",
)
COURSE = ("step", *COLUMNS[:5], "validation/new/accuracy", "start/new/forward_kl", "start/prior/forward_kl")


def main(study: Path) -> None:
    report(study)
    for name in (
        "results.csv",
        "comparisons.csv",
        "forgetting.png",
        "cost.png",
        "robustness.png",
        "divergence.png",
        "learning.png",
    ):
        shutil.copy(study / name, HERE / name)
    runs = load_study(study)[0]
    courses = [
        {"method": run.name, "seed": run.seed} | {n: h.get(n) for n in COURSE}
        for run in runs
        for h in run.evaluation["history"]
    ]
    with (HERE / "courses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in courses for name in row)))
        writer.writeheader()
        writer.writerows(courses)
    print("| | " + " | ".join(COLUMNS) + " | reached |")
    for label, cell in labels(runs).items():
        told = [metrics(run) for run in cell]
        spread = [(mean(t[c] for t in told), min(t[c] for t in told), max(t[c] for t in told)) for c in COLUMNS]
        cells = [f"{m:.3f} [{a:.3f}, {b:.3f}]" if m < 2 else f"{m:,.3g}" for m, a, b in spread]
        print(f"| `{label}` | " + " | ".join(cells) + f" | {sum(not run.censored for run in cell)} of {len(cell)} |")
    everything = sum(sum(run.ledger["seconds"].values()) for run in runs)
    print(f"all runs together: {everything / 60:.1f} minutes, evaluation included")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
