"""Which divergence, and over how much of the vocabulary? Each at three learning rates.

python -m experiments.divergences.run
"""

from collections.abc import Sequence
from itertools import product
from math import isclose
from statistics import median

from experiments.figures import curves
from experiments.grid import Bench, Row, between, paired, picked, row, spread, start, table
from experiments.looks import DOUBLED, LOOKS, SEEDS, by_look, changed
from opd_lightning.loggers import read_csv

ARMS = {
    "reverse_kl": ["method=opd"],
    "forward_kl": ["method=opd", "loss/divergence=forward_kl"],
    "jsd": ["method=opd", "loss/divergence=jsd"],
    "total_variation": ["method=opd", "loss/divergence=total_variation"],
    "top4_tail": ["method=opd_topk", "loss.support.k=4"],
    "top4_renormalised": ["method=opd_topk", "loss.support.k=4", "loss.support.rest=renormalise"],
    "top4_of_student": ["method=opd_topk", "loss.support.k=4", "loss.support.of=student"],
    "sampled": ["method=opd_sampled"],
    "sampled_baseline": ["method=opd_sampled", "loss/support=sampled_baseline"],
}
RATES, BASE = ("5e-5", "2e-4", "8e-4"), "reverse_kl"
STAGES = {"updates 5-20": range(5, 21), "updates 25-60": range(25, 61)}
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format")
COMPARED = ("prior/accuracy", "new/accuracy", "updates")
PROTOCOL = ["evaluation=validation", "evaluation.every=5", "task.n_eval=128", "budget.accuracy=0.95", "budget.in_a_row=1"]
PROTOCOL += [
    "trainer.max_steps=150",
    "+evaluation.suite.accuracy={_target_:opd_lightning.evaluation.GreedyAccuracy,split:test,max_new_tokens:12}",
]


def main(bench: Bench) -> None:
    cells = [
        ({"arm": arm, "lr": rate, "seed": seed}, [*ARMS[arm], f"name={arm}", f"optim.lr={rate}", f"seed={seed}", *PROTOCOL])
        for arm, rate, seed in product(ARMS, RATES, SEEDS)
    ]
    bench.write([row(labels, run, NUMBERS) for labels, run in bench.run("divergences", cells)])
    panel(bench)
    tell(bench)


def panel(bench: Bench) -> None:
    """Gradient estimates beside the exact one, along one run per seed."""
    cells = [
        (
            {"arm": "panel", "seed": seed},
            [
                "method=opd",
                "name=panel",
                f"seed={seed}",
                "callbacks=estimators",
                "callbacks.estimators.every=5",
                "optim.lr=2e-4",
                "callbacks.estimators.rows=32",
                "callbacks.estimators.draws=32",
                "trainer.max_steps=60",
                "evaluation=none",
            ],
        )
        for seed in SEEDS
    ]
    found = [
        {"seed": labels["seed"], "step": r["step"]} | {k: v for k, v in r.items() if k.startswith("estimators/")}
        for labels, run in bench.run("divergences-panel", cells)
        for r in read_csv(run.folder / "metrics.csv")
        if any(k.startswith("estimators/") for k in r)
    ]
    bench.write(found, "estimators.csv")


def tell(bench: Bench) -> None:
    rows = bench.read()
    print(f"{sum(r['reached'] for r in rows)} of {len(rows)} runs reached 0.95")
    late = middle([r["updates"] for r in picked(rows, lr=RATES[-1])])
    print(f"Updates at {RATES[-1]}, median, least and greatest of all runs: {late}")
    for number, digits in (("updates", 0), ("prior/accuracy", 3)):
        print(
            f"\n{number} when the new skill is at 0.95, mean and interval over seeds; in brackets how many of them reached it\n"
        )
        print(table(["", *RATES], ([f"`{arm}`", *(there(rows, arm, rate, number, digits) for rate in RATES)] for arm in ARMS)))
    for number in COMPARED:
        print(f"\nDifference to `reverse_kl` in {number}, paired by seed\n")
        lines = ([f"`{a}`", *(paired(picked(rows, lr=rate), a, BASE, number) for rate in RATES)] for a in ARMS if a != BASE)
        print(table(["", *RATES], lines))
    print(f"\nPrior skills at {RATES[0]} less those at {RATES[-1]}, paired by seed\n")
    ends = ({"lr": RATES[0]}, {"lr": RATES[-1]})
    print(table(["", "difference"], ([f"`{a}`", between(picked(rows, arm=a), *ends, "prior/accuracy")] for a in ARMS)))
    looks(rows)
    tell_panel(bench.read("estimators.csv"))
    kept = {
        arm: {float(rate): [r["prior/accuracy"] for r in picked(rows, arm=arm, lr=rate, reached=True)] for rate in RATES}
        for arm in ARMS
    }
    y = "accuracy on prior skills when the\nnew one reaches 0.95 (test prompts)"
    curves(bench.results / "divergences.png", {"": kept}, "learning rate", y, log=True)


def there(rows: list[Row], arm: str, rate: str, number: str, digits: int) -> str:
    """Mean and interval of the runs that reached the target."""
    mine = picked(rows, arm=arm, lr=rate)
    reached = [r[number] for r in mine if r["reached"]]
    return f"{spread(reached, digits)} ({len(reached)}/{len(mine)})" if reached else f"never (0/{len(mine)})"


def looks(rows: list[Row]) -> None:
    """Differences whose verdict the added seeds change."""
    print(f"\nDifferences to `{BASE}` whose verdict the added seeds change, paired by seed\n")
    lines = []
    for number, rate, arm in product(COMPARED, RATES, ARMS):
        mine = picked(rows, lr=rate)
        if changed(mine, arm, BASE, number):
            lines.append([f"`{arm}` at {rate}", number, *by_look(mine, arm, BASE, number)])
    print(table(["", "number", *LOOKS, DOUBLED], lines))


def tell_panel(found: list[Row]) -> None:
    """Estimates by stage; in the later one, measurements whose draws are all alike apart from the others."""
    names = sorted({k for r in found for k in r if k.startswith("estimators/")})
    print("\nEstimates of the gradient beside the exact one: medians over the stage and all runs, and least and greatest\n")
    lines = ([worded(n), *(middle([r[n] for r in found if r["step"] in some]) for some in STAGES.values())] for n in names)
    print(table(["", *STAGES], lines))
    title, steps = list(STAGES.items())[-1]
    print(
        f"\nSampled tokens in {title}: measurements whose draws are all alike (variance equals squared bias), and the others\n"
    )
    lines = []
    for name in ("sampled", "sampled_baseline"):
        numbers = [f"estimators/{name}/{n}" for n in ("variance", "squared_bias")]
        pairs = [[r[n] for n in numbers] for r in found if r["step"] in steps]
        apart = [(v, b) for v, b in pairs if not isclose(v, b, rel_tol=1e-6)]
        lines.append([f"`{name}`", len(pairs), len(pairs) - len(apart), *(middle(some) for some in zip(*apart, strict=True))])
    print(table(["", "measurements", "alike", "variance of the others", "squared bias of the others"], lines))


def worded(name: str) -> str:
    """What a column of estimators.csv is called in tables."""
    _, estimate, number = name.split("/")
    return f"`{estimate}` {number.replace('_', ' ')}"


def middle(values: Sequence[float]) -> str:
    """Median, least and greatest."""
    return f"{median(values):.3g} (from {min(values):.3g} to {max(values):.3g})" if values else ""


if __name__ == "__main__":
    start(main, __file__, tell)
