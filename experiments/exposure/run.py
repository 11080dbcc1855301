"""Does training on the teacher's or the data's prefixes leave a student that errs on its own, more so the longer the answer?

python -m experiments.exposure.run
"""

from itertools import product

from experiments.density.run import LONG
from experiments.figures import curves
from experiments.grid import Bench, paired, row, spread, start, table

OFF_POLICY = "rollout=teacher"
ARMS = {
    "sft": ["method=sft", "task.style=native"],
    "seqkd": ["method=seqkd"],
    "kd_forward": ["method=opd", OFF_POLICY, "loss/divergence=forward_kl"],
    "kd_reverse": ["method=opd", OFF_POLICY],
    "opd_forward": ["method=opd", "loss/divergence=forward_kl"],
    "opd_reverse": ["method=opd"],
}
UPDATES, SEEDS, LENGTH = (20, 60), (0, 1, 2), 8
PROTOCOL = ["optim.lr=2e-4", f"task.length={LENGTH}", "task.max_new_tokens=10", "evaluation.every=1000", "task.n_eval=256"]
PROTOCOL += [
    "~evaluation.suite.teacher",
    "+evaluation.suite.positions={_target_:experiments.exposure.positions.Positions,max_new_tokens:10}",
]


def main(bench: Bench) -> None:
    folder = bench.starts({"long": LONG})["long"]
    cells = [
        (
            {"arm": arm, "budget": updates, "seed": seed},
            [*ARMS[arm], f"name={arm}", f"trainer.max_steps={updates}", f"seed={seed}", *bench.begin(folder), *PROTOCOL],
        )
        for updates, arm, seed in product(UPDATES, ARMS, SEEDS)
    ]
    numbers = [f"position/{i}/{kind}" for kind in ("own", "right", "wrong") for i in range(1, LENGTH + 1)]
    rows = []
    for labels, run in bench.run("exposure", cells):
        end = run.evaluation["end"]
        mean = {
            kind: sum(end[f"position/{i}/{kind}"] for i in range(2, LENGTH + 1)) / (LENGTH - 1)
            for kind in ("own", "right", "wrong")
        }
        last = end[f"position/{LENGTH}/right"] - end[f"position/{LENGTH}/own"]
        more = mean | {"gap": mean["right"] - mean["own"], "gap at the last digit": last}
        rows.append(row(labels, run, ["new/accuracy", "prior/accuracy", *numbers]) | more)
    bench.write(rows)
    names = ["new/accuracy", "own", "right", "wrong", "gap", "gap at the last digit"]
    for updates in UPDATES:
        mine = [r for r in rows if r["budget"] == updates]
        print(f"\nAfter {updates} updates; digits 2 to {LENGTH}, mean and interval over seeds; differences paired by seed\n")
        print(
            table(
                ["", *names],
                ([f"`{a}`", *(spread([r[n] for r in mine if r["arm"] == a]) for n in names)] for a in ARMS if mine),
            )
        )
        lines = ([f"`{a}` - `seqkd`", *(paired(mine, a, "seqkd", n) for n in names)] for a in ARMS if a != "seqkd")
        print(table(["", *names], lines))
    panels = {
        f"{title}, {UPDATES[0]} updates": {
            arm: {
                i: [r[f"position/{i}/{kind}"] for r in rows if (r["arm"], r["budget"]) == (arm, UPDATES[0])]
                for i in range(2, LENGTH + 1)
            }
            for arm in ARMS
        }
        for kind, title in (("own", "own prefix"), ("right", "right prefix"), ("wrong", "one wrong digit before"))
    }
    curves(bench.results / "positions.png", panels, "digit of the answer", "share that is right (test)")


if __name__ == "__main__":
    start(main, __file__)
