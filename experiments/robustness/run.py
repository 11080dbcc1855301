"""At the same accuracy, who still answers rightly when pushed off the usual path? On the runs of less_forgetting.

python -m experiments.robustness.run
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean

from experiments.figures import dots
from experiments.grid import Bench, Row, paired, picked, row, spread, start, table
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
FOREIGN = ("robust/corrupted_2", "robust/corrupted_4")
DRAWN = (*FOREIGN, "robust/worst")
TAUGHT = ("sdft", "sdft_reverse", "opd")  # by a teacher's verdict on the student's own completions
NEW = ("tolerant-1k", "fragile-0k", "fragile-1k")  # they came when the claims had been made on seven others, and test them


def main(bench: Bench) -> None:
    rows = [row(labels, run, ("robust/none", *PERTURBED, *OVERALL)) for labels, run in grid(bench)]
    rows = [r for r in rows if bench.small or (r["lr"] == RATE and r["reached"])]
    bench.write(rows)
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read() + bench.earlier()
    names = sorted(dict.fromkeys(r["start"] for r in rows), key=NEW.__contains__)
    starts = {name: picked(rows, start=name) for name in names}
    for name, mine in starts.items():
        print(f"\n{name}: accuracy on the new skill under one perturbation at a time, mean over seeds\n")
        lines = []
        for arm in ARMS:
            some = picked(mine, arm=arm)
            if some:
                means = (average(some, k) for k in PERTURBED)
                lines.append([f"`{arm}`", *means, *(spread([r[k] for r in some], 2) for k in OVERALL), worst(some)])
        print(table(["", *PERTURBED.values(), *OVERALL.values(), "which it is"], lines))
    for key in FOREIGN:
        print(f"\nAccuracy on the new skill at a {PERTURBED[key]}, mean over seeds\n")
        lines = ([f"`{name}`", *(average(picked(mine, arm=arm), key) for arm in ARMS)] for name, mine in starts.items())
        print(table(["", *(f"`{arm}`" for arm in ARMS)], lines))
        print(f"\nDifferences at a {PERTURBED[key]}, paired by seed, among those that write in the native style\n")
        print(differences(starts, list(product(TAUGHT, ("sft_native", "grpo"))), key))
    for key, title in OVERALL.items():
        print(f"\nDifferences to `sft`, {title}, paired by seed\n")
        print(differences(starts, [(arm, "sft") for arm in ARMS if arm != "sft"], key))
    in_the_demo(Bench(bench.results.parent / "demo"))
    sides = {
        "seven start models": [r for r in rows if r["start"] not in NEW],
        "three more": [r for r in rows if r["start"] in NEW],
    }
    panels = {
        f"{(PERTURBED | OVERALL)[key]}, {which}": {arm: [r[key] for r in picked(some, arm=arm)] for arm in ARMS}
        for (which, some), key in product(sides.items(), DRAWN)
    }
    dots(bench.results / "robustness.png", panels, "accuracy on the new skill", columns=len(DRAWN))


def average(rows: Sequence[Row], number: str) -> str:
    """Mean over these runs; an arm that was not run has none."""
    return f"{mean(r[number] for r in rows):.2f}" if rows else ""


def differences(starts: Mapping[str, Sequence[Row]], pairs: Sequence[tuple[str, str]], number: str) -> str:
    """A table of the first arms' differences to the second ones: a line per start model, and how many pairs of runs agree."""
    lines = [[f"`{name}`", *(paired(rows, *pair, number) for pair in pairs)] for name, rows in starts.items()]
    lines.append(["pairs above 0", *(above(starts, *pair, number) for pair in pairs)])
    return table(["", *(f"`{arm}` - `{baseline}`" for arm, baseline in pairs)], lines)


def above(starts: Mapping[str, Sequence[Row]], arm: str, baseline: str, number: str) -> str:
    """In how many pairs of runs with one start model and seed an arm is above the baseline."""
    found = []
    for rows in starts.values():
        base = {r["seed"]: r[number] for r in picked(rows, arm=baseline)}
        found += [r[number] > base[r["seed"]] for r in picked(rows, arm=arm) if r["seed"] in base]
    return f"{sum(found)} of {len(found)}"


def in_the_demo(demo: Bench) -> None:
    """The same comparison with GRPO where each method has its own rate and ends after two evaluations at 0.95."""
    if not (demo.results / "results.csv").is_file():
        return  # a shrunken version of this experiment
    rows = [r | {"arm": r["method"]} for r in demo.read()]
    print("\nThe same in the demo, paired by seed\n")
    lines = ([f"`{a}` - `grpo`", *(paired(rows, a, "grpo", k) for k in FOREIGN)] for a in ("sdft", "opd"))
    print(table(["", *(PERTURBED[k] for k in FOREIGN)], lines))


def worst(rows: Sequence[Row]) -> str:
    """Which perturbation is the worst one, and in how many of these runs; equals count for both."""
    found = Counter(key for row in rows for key in PERTURBED if row[key] == row["robust/worst"])
    return ", ".join(f"{PERTURBED[key]} ({n})" for key, n in found.most_common())


if __name__ == "__main__":
    start(main, __file__, tell)
