"""A question with several right answers: which methods keep finding them all, and which settle on one?

python -m experiments.diversity.run
"""

from itertools import product

from experiments.figures import dots
from experiments.grid import Bench, paired, row, spread, start, table

TASK = "task._target_=experiments.diversity.several.AnyRotation"
NATIVE = "task.style=native"
ARMS = {
    "sft": ["method=sft", NATIVE],
    "sdft": ["method=sdft", NATIVE],
    "sdft_foreign": ["method=sdft"],
    "opd_forward": ["method=opd", "loss/divergence=forward_kl"],
    "opd_reverse": ["method=opd"],
    "opd_sampled": ["method=opd_sampled"],
    "grpo": ["method=grpo"],
}
SEEDS, UPDATES = (0, 1, 2), 100
NUMBERS = ("new/accuracy", "found/pass_at_1", "found/share", "new/pass@4", "new/pass@16", "prior/accuracy")
PROTOCOL = [
    TASK,
    "optim.lr=2e-4",
    "evaluation=sampled",
    "~evaluation.suite.teacher",
    "evaluation.every=1000",
    "task.n_eval=128",
]
PROTOCOL += ["evaluation.suite.sampled.samples=16", "evaluation.suite.sampled.passes=[1,4,16]"]
PROTOCOL += ["+evaluation.suite.found={_target_:experiments.diversity.several.Found,max_new_tokens:12}"]


def main(bench: Bench) -> None:
    """The teacher is the start model after SFT on many questions, one of the right answers each."""
    given = ["method=sft", "name=teacher", NATIVE, "task.n_train=8192", "trainer.max_steps=400", "optim.lr=5e-4"]
    ((_, teacher),) = bench.run("diversity-teacher", [({"arm": "teacher"}, [*given, *PROTOCOL[2:], TASK])])
    cells = [
        (
            {"arm": arm, "seed": seed},
            [
                *ARMS[arm],
                f"name={arm}",
                f"seed={seed}",
                f"trainer.max_steps={UPDATES}",
                f"model.teacher={teacher.folder}",
                *PROTOCOL,
            ],
        )
        for arm, seed in product(ARMS, SEEDS)
    ]
    rows = [row({"arm": "teacher"}, teacher, NUMBERS)]
    rows += [row(labels, run, NUMBERS) for labels, run in bench.run("diversity", cells)]
    bench.write(rows)
    lines = ([f"`{a}`", *(spread([r[n] for r in rows if r["arm"] == a]) for n in NUMBERS)] for a in ("teacher", *ARMS))
    print(table(["", *NUMBERS], lines))
    print("\nDifference to `sft`, paired by seed\n")
    mine = [r for r in rows if r["arm"] != "teacher"]
    print(table(["", *NUMBERS], ([f"`{a}`", *(paired(mine, a, "sft", n) for n in NUMBERS)] for a in ARMS if a != "sft")))
    told = [paired(mine, "opd_forward", "opd_reverse", n) for n in NUMBERS]
    print("\nDifference of `opd_forward` to `opd_reverse`\n\n" + table(NUMBERS, [told]))
    titles = {"found/pass_at_1": "a sample is right", "found/share": "share of right answers found in 16 samples"}
    panels = {title: {a: [r[n] for r in rows if r["arm"] == a] for a in ("teacher", *ARMS)} for n, title in titles.items()}
    dots(bench.results / "diversity.png", panels, "share (test questions)")


if __name__ == "__main__":
    start(main, __file__)
