"""results.csv, rates.png and the README's tables from the runs of study=demo_lr.

python -m experiments.learning_rates.collect outputs/demo_lr
"""

import csv
import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.grid import paired, spread, table
from opd_lightning.report.figures import COLOURS, LINES, MARKERS
from opd_lightning.report.runs import load_study

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    runs, left_out = load_study(folder)
    print(*(f"note: {sentence}" for sentence in left_out), sep="\n")
    rows = []
    for run in sorted(runs, key=lambda r: (r.name, r.config["optim"]["lr"], r.seed)):
        end = run.evaluation["end"]
        row = {"arm": run.name, "lr": float(run.config["optim"]["lr"]), "seed": run.seed, "censored": run.censored}
        row |= {"new": end["validation/new/accuracy"], "prior": end["validation/prior/accuracy"]}
        row |= {"prior_format": end["validation/prior/format"], "updates": run.ledger["steps"]}
        row |= {"flops": sum(run.ledger["flops"].values()), "student_tokens": run.ledger["tokens"]["student_tokens"]}
        rows.append(row)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    rates = sorted({row["lr"] for row in rows})
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    lines, differences = [], []
    for i, name in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        cells = {rate: [row for row in rows if (row["arm"], row["lr"]) == (name, rate)] for rate in rates}
        reached = {rate: cell for rate, cell in cells.items() if not any(r["censored"] for r in cell)}
        updates = {rate: f"({mean(r['updates'] for r in cell):.0f})" for rate, cell in reached.items()}
        told = (
            f"{spread([r['prior'] for r in cells[rate]])} {updates[rate]}" if rate in reached else "never" for rate in rates
        )
        lines.append([f"`{name}`", *told])
        pairs = (
            paired([r for r in rows if r["lr"] == rate], name, "sft", "prior") if rate in reached else "" for rate in rates
        )
        differences.append([f"`{name}` - `sft`", *pairs])
        if reached:
            axes.plot(
                list(reached),
                [mean(r["prior"] for r in cell) for cell in reached.values()],
                color=COLOURS[i],
                linestyle=LINES[i % 4],
                marker=MARKERS[i],
                label=name,
            )
            for rate, cell in reached.items():
                axes.plot([rate] * len(cell), [r["prior"] for r in cell], ".", color=COLOURS[i], markersize=3)
    print(table(["method", *(f"{rate:g}" for rate in rates)], lines))
    print("\ndifferences, paired by seed\n")
    print(table(["", *(f"{rate:g}" for rate in rates)], [line for line in differences if line[0] != "`sft` - `sft`"]))
    axes.set(
        xscale="log", xlabel="learning rate", ylabel="accuracy on prior skills when the\nnew one reaches 0.95 (validation)"
    )
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(HERE / "rates.png", dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
