"""At the same accuracy, who still answers rightly when pushed off the usual path? On the runs of less_forgetting.

python -m experiments.robustness.run
"""

from collections import Counter
from itertools import product

from experiments.figures import dots
from experiments.grid import Bench, paired, row, spread, start, table
from experiments.less_forgetting.run import ARMS, grid

RATE = "2e-4"
PERTURBED = {
    "robust/opening_answer": "native opening",
    "robust/opening_result": "foreign opening",
    "robust/corrupted_2": "foreign token 2",
    "robust/corrupted_4": "foreign token 4",
    "robust/distracted_red": "distractor",
    "robust/temperature_1.0": "temperature 1",
    "robust/noise_0.05": "weight noise 0.05",
    "robust/noise_0.1": "weight noise 0.1",
}
OVERALL = {"robust/mean": "mean", "robust/worst": "worst"}


def main(bench: Bench) -> None:
    rows = [row(labels, run, ("robust/none", *PERTURBED, *OVERALL)) for labels, run in grid(bench)]
    rows = [r for r in rows if bench.small or (r["lr"] == RATE and r["reached"])]
    bench.write(rows)
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read() + bench.earlier()
    names = list(dict.fromkeys(r["start"] for r in rows))
    for name in names:
        mine = [r for r in rows if r["start"] == name]
        print(f"\n{name}: accuracy on the new skill under one perturbation at a time, mean over seeds\n")
        lines = []
        for arm in ARMS:
            some = [r for r in mine if r["arm"] == arm]
            if some:
                means = [f"{sum(r[k] for r in some) / len(some):.2f}" for k in PERTURBED]
                lines.append([f"`{arm}`", *means, *(spread([r[k] for r in some], 2) for k in OVERALL), worst(some)])
        print(table(["", *PERTURBED.values(), *OVERALL.values(), "which it is"], lines))
        told = ([f"`{a}`", *(paired(mine, a, "sft", k) for k in OVERALL)] for a in ARMS if a != "sft")
        print("\nDifference to `sft`, paired by seed\n\n" + table(["", *OVERALL.values()], told))
    print("\nDifferences at a foreign token, paired by seed, among those that write in the native style\n")
    lines = (
        [f"`{a}` - `{b}`, {PERTURBED[k]}", *(paired([r for r in rows if r["start"] == n], a, b, k) for n in names)]
        for k in ("robust/corrupted_2", "robust/corrupted_4")
        for a, b in product(("sdft", "sdft_reverse", "opd"), ("sft_native", "grpo"))
    )
    print(table(["", *names], lines))
    in_the_demo(Bench(bench.results.parent / "demo"))
    panels = {
        f"{name}, {(PERTURBED | OVERALL)[key]}": {
            arm: [r[key] for r in rows if (r["arm"], r["start"]) == (arm, name)] for arm in ARMS
        }
        for key, name in product(("robust/corrupted_2", "robust/corrupted_4", "robust/worst"), names)
    }
    dots(bench.results / "robustness.png", panels, "accuracy on the new skill", columns=len(names))


def in_the_demo(demo: Bench) -> None:
    """The same comparison with GRPO where each method has its own rate and ends after two evaluations at 0.95."""
    if not (demo.results / "results.csv").is_file():
        return  # a shrunken version of this experiment
    rows = [r | {"arm": r["method"]} for r in demo.read()]
    print("\nThe same in the demo, paired by seed\n")
    keys = ("robust/corrupted_2", "robust/corrupted_4")
    lines = ([f"`{a}` - `grpo`", *(paired(rows, a, "grpo", k) for k in keys)] for a in ("sdft", "opd"))
    print(table(["", *(PERTURBED[k] for k in keys)], lines))


def worst(rows) -> str:
    """Which perturbation is the worst one, and in how many of these runs; equals count for both."""
    found = Counter(key for row in rows for key in PERTURBED if row[key] == row["robust/worst"])
    return ", ".join(f"{PERTURBED[key]} ({n})" for key, n in found.most_common())


if __name__ == "__main__":
    start(main, __file__, tell)
