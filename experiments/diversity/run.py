"""A question with several right answers: which methods keep finding them all, and which settle on one?

python -m experiments.diversity.run
"""

from itertools import product
from statistics import mean

from experiments.figures import dots
from experiments.grid import Bench, paired, picked, row, spread, start, table
from experiments.looks import DOUBLED, LOOKS, SEEDS, by_look, changed

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
OTHERS = (  # compared beside each arm with `sft`
    ("opd_forward", "opd_reverse"),
    ("opd_forward", "grpo"),
    ("opd_reverse", "grpo"),
    ("opd_sampled", "opd_forward"),
    ("opd_sampled", "opd_reverse"),
)
UPDATES = 100
NUMBERS = ("new/accuracy", "found/pass_at_1", "found/share", "new/pass@4", "new/pass@16", "prior/accuracy")
RATE = "optim.lr=2e-4"  # of all but the teacher
PROTOCOL = [TASK, "evaluation=sampled", "~evaluation.suite.teacher", "evaluation.every=1000", "task.n_eval=128"]
PROTOCOL += ["evaluation.suite.sampled.samples=16", "evaluation.suite.sampled.passes=[1,4,16]"]
PROTOCOL += ["+evaluation.suite.found={_target_:experiments.diversity.several.Found,max_new_tokens:12}"]


def main(bench: Bench) -> None:
    """The teacher is the start model after SFT on many questions, one of the right answers each."""
    given = ["method=sft", "name=teacher", NATIVE, "task.n_train=8192", "trainer.max_steps=400", "optim.lr=5e-4"]
    ((_, teacher),) = bench.run("diversity-teacher", [({"arm": "teacher"}, [*given, *PROTOCOL])])
    cells = [
        (
            {"arm": arm, "seed": seed},
            [
                *ARMS[arm],
                f"name={arm}",
                f"seed={seed}",
                f"trainer.max_steps={UPDATES}",
                f"model.teacher={teacher.folder}",
                RATE,
                *PROTOCOL,
            ],
        )
        for arm, seed in product(ARMS, SEEDS)
    ]
    rows = [row({"arm": "teacher"}, teacher, NUMBERS)]
    rows += [row(labels, run, NUMBERS) for labels, run in bench.run("diversity", cells)]
    bench.write(rows)
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read()
    found = {arm: picked(rows, arm=arm) for arm in ("teacher", *ARMS)}
    print(f"\nAfter {UPDATES} updates (the teacher: after its own), mean and interval over seeds\n")
    lines = (
        [f"`{a}`", *(spread([r[n] for r in some]) for n in NUMBERS), f"{mean(r['student_tokens'] for r in some):.0f}"]
        for a, some in found.items()
    )
    print(table(["", *NUMBERS, "student tokens"], lines))
    print("\nDifferences, paired by seed\n")
    compared = [(arm, "sft") for arm in ARMS if arm != "sft"] + list(OTHERS)
    print(table(["", *NUMBERS], ([f"`{a}` - `{b}`", *(paired(rows, a, b, n) for n in NUMBERS)] for a, b in compared)))
    print("\nDifferences whose verdict the added seeds change, paired by seed\n")
    lines = (
        [f"`{a}` - `{b}`", n, *by_look(rows, a, b, n)] for (a, b), n in product(compared, NUMBERS) if changed(rows, a, b, n)
    )
    print(table(["", "number", *LOOKS, DOUBLED], lines))
    titles = {"found/pass_at_1": "a sample is right", "found/share": "share of right answers found in 16 samples"}
    panels = {title: {a: [r[n] for r in some] for a, some in found.items()} for n, title in titles.items()}
    dots(bench.results / "diversity.png", panels, "share (test questions)")


if __name__ == "__main__":
    start(main, __file__, tell)
