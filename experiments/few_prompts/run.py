"""How many training prompts does each method need?

python -m experiments.few_prompts.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, between, paired, picked, row, spread, start, table

COUNTS = (1, 4, 16, 64, 256)
ARMS = {"sft": ["method=sft"], "sdft": ["method=sdft"], "opd": ["method=opd"], "grpo": ["method=grpo"]}
SEEDS = (0, 1, 2)
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format")
PROTOCOL = ["optim.lr=2e-4", "trainer.max_steps=100", "evaluation.every=50", "~evaluation.suite.teacher", "data.batch_size=32"]


def main(bench: Bench) -> None:
    cells = [
        (
            {"arm": arm, "prompts": n, "seed": seed},
            [*ARMS[arm], f"name={arm}", f"task.n_train={n}", f"seed={seed}", *PROTOCOL],
        )
        for arm, n, seed in product(ARMS, COUNTS, SEEDS)
    ]
    rows = [row(labels, run, NUMBERS) for labels, run in bench.run("few_prompts", cells)]
    bench.write(rows)
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read()
    for number in NUMBERS[:2]:
        print(f"\n{number} on test prompts after 100 updates, mean and interval over seeds\n")
        found = {(a, n): [r[number] for r in rows if (r["arm"], r["prompts"]) == (a, n)] for a in ARMS for n in COUNTS}
        print(
            table(
                ["method", *COUNTS], ([f"`{a}`", *(spread(found[a, n]) if found[a, n] else "" for n in COUNTS)] for a in ARMS)
            )
        )
        lines = (
            [f"`{a}` - `sft`", *(paired([r for r in rows if r["prompts"] == n], a, "sft", number) for n in COUNTS)]
            for a in ARMS
            if a != "sft"
        )
        print(table(["difference, paired by seed", *COUNTS], lines))
    print("\nDifference of 256 prompts to one in prior/accuracy, paired by seed\n")
    ends = ({"prompts": COUNTS[-1]}, {"prompts": COUNTS[0]})
    print(table(["method", "256 - 1"], ([f"`{a}`", between(picked(rows, arm=a), *ends, "prior/accuracy")] for a in ARMS)))
    panels = {
        title: {a: {n: [r[number] for r in rows if (r["arm"], r["prompts"]) == (a, n)] for n in COUNTS} for a in ARMS}
        for title, number in (("new skill", "new/accuracy"), ("prior skills", "prior/accuracy"))
    }
    curves(bench.results / "few_prompts.png", panels, "distinct training prompts", "accuracy (greedy, test prompts)", log=True)


if __name__ == "__main__":
    start(main, __file__, tell)
