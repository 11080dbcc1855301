"""How many training prompts does each method need?

python -m experiments.few_prompts.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, Row, between, paired, picked, row, spread, start, table

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
    for number in NUMBERS:
        print(f"\n{number} on test prompts after 100 updates, mean and interval over seeds\n")
        found = by_count(rows, number)
        print(table(["method", *COUNTS], ([f"`{a}`", *(spread(v) if v else "" for v in found[a].values())] for a in ARMS)))
        lines = (
            [f"`{a}` - `sft`", *(paired(picked(rows, prompts=n), a, "sft", number) for n in COUNTS)] for a in ARMS if a != "sft"
        )
        print(table(["difference, paired by seed", *COUNTS], lines))
    print("\nDifference of 256 prompts to one in prior/accuracy, paired by seed\n")
    ends = ({"prompts": COUNTS[-1]}, {"prompts": COUNTS[0]})
    print(table(["method", "256 - 1"], ([f"`{a}`", between(picked(rows, arm=a), *ends, "prior/accuracy")] for a in ARMS)))
    panels = {title: by_count(rows, f"{skill}/accuracy") for title, skill in (("new skill", "new"), ("prior skills", "prior"))}
    curves(bench.results / "few_prompts.png", panels, "distinct training prompts", "accuracy (greedy, test prompts)", log=True)


def by_count(rows: list[Row], number: str) -> dict[str, dict[float, list[float]]]:
    """A number of the runs, by method and by how many prompts they had."""
    return {a: {n: [r[number] for r in picked(rows, arm=a, prompts=n)] for n in COUNTS} for a in ARMS}


if __name__ == "__main__":
    start(main, __file__, tell)
