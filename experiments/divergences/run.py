"""Which divergence, and over how much of the vocabulary? Each at three learning rates.

python -m experiments.divergences.run
"""

from itertools import product
from statistics import median

from experiments.figures import curves
from experiments.grid import Bench, paired, row, spread, start, table
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
RATES, SEEDS = ("5e-5", "2e-4", "8e-4"), (0, 1, 2)
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format")
PROTOCOL = ["evaluation=validation", "evaluation.every=5", "task.n_eval=128", "budget.accuracy=0.95", "budget.in_a_row=1"]
PROTOCOL += [
    "trainer.max_steps=150",
    *(
        f"+evaluation.suite.{o}"
        for o in ("accuracy={_target_:opd_lightning.evaluation.GreedyAccuracy,split:test,max_new_tokens:12}",)
    ),
]


def main(bench: Bench) -> None:
    cells = [
        ({"arm": arm, "lr": rate, "seed": seed}, [*ARMS[arm], f"name={arm}", f"optim.lr={rate}", f"seed={seed}", *PROTOCOL])
        for arm, rate, seed in product(ARMS, RATES, SEEDS)
    ]
    rows = [row(labels, run, NUMBERS) for labels, run in bench.run("divergences", cells)]
    bench.write(rows)
    for number, digits in (("updates", 0), ("prior/accuracy", 3)):
        print(
            f"\n{number} when the new skill is at 0.95, mean and interval over seeds; in brackets how many of them reached it\n"
        )
        print(table(["", *RATES], ([f"`{arm}`", *(told(rows, arm, rate, number, digits) for rate in RATES)] for arm in ARMS)))
    for number in ("prior/accuracy", "new/accuracy", "updates"):
        print(f"\nDifference to `reverse_kl` in {number}, paired by seed\n")
        lines = (
            [f"`{a}`", *(paired([r for r in rows if r["lr"] == rate], a, "reverse_kl", number) for rate in RATES)]
            for a in ARMS
            if a != "reverse_kl"
        )
        print(table(["", *RATES], lines))
    panel(bench)
    panels = {
        title: {
            arm: {float(rate): [r[n] for r in rows if (r["arm"], r["lr"]) == (arm, rate) and r["reached"]] for rate in RATES}
            for arm in ARMS
        }
        for title, n in (("prior skills at 0.95 on the new one", "prior/accuracy"), ("new skill there", "new/accuracy"))
    }
    curves(bench.results / "divergences.png", panels, "learning rate", "accuracy (greedy, test prompts)", log=True)


def told(rows, arm: str, rate: str, number: str, digits: int) -> str:
    """Mean and interval of the runs that reached the target."""
    mine = [r for r in rows if (r["arm"], r["lr"]) == (arm, rate)]
    reached = [r[number] for r in mine if r["reached"]]
    return f"{spread(reached, digits)} ({len(reached)}/{len(mine)})" if reached else f"never (0/{len(mine)})"


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
    if not found:
        return
    bench.write(found, "estimators.csv")
    stages = {"updates 5-20": range(5, 21), "updates 25-60": range(25, 61)}
    names = sorted({k for r in found for k in r if k.startswith("estimators/")})
    print("\nEstimates of the gradient beside the exact one: medians over the stage and three runs, and least and greatest\n")
    values = {
        (n, title): [r[n] for r in found if r["step"] in some and n in r] for n in names for title, some in stages.items()
    }
    told = {key: f"{median(v):.3g} [{min(v):.3g}, {max(v):.3g}]" if v else "" for key, v in values.items()}
    print(table(["", *stages], ([n.removeprefix("estimators/"), *(told[n, title] for title in stages)] for n in names)))


if __name__ == "__main__":
    start(main, __file__)
