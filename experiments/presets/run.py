"""Every preset that can learn the embedded world's new skill, from one start model, at one rate.

python -m experiments.presets.run
"""

from itertools import product
from statistics import mean

from experiments.figures import dots
from experiments.grid import Bench, paired, picked, row, spread, start, table

SUPERVISED = ("sft", "sft_kl", "seqkd", "kd")
DISTILLED = ("gkd", "opd", "opd_topk", "opd_sampled", "sdft", "opsd", "sdpo")
REWARDED = ("reinforce", "rloo", "grpo", "grpo_opd")
PRESETS = (*SUPERVISED, *DISTILLED, *REWARDED)
ARMS = {name: [f"method={name}"] for name in PRESETS}
ARMS["kd_native"] = ["method=kd", "task.style=native"]  # is it the style of its references that `kd` fails for?
SEEDS = (0, 1, 2)
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format")
PROTOCOL = ["trainer.max_steps=100", "evaluation.every=10", "~evaluation.suite.teacher"]


def main(bench: Bench) -> None:
    cells = [
        ({"arm": arm, "seed": seed}, [*ARMS[arm], f"name={arm}", f"seed={seed}", *PROTOCOL])
        for arm, seed in product(ARMS, SEEDS)
    ]
    rows = []
    for labels, run in bench.run("presets", cells):
        half = [h["step"] for h in run.evaluation["history"] if h["new/accuracy"] >= 0.5]
        tokens = {"teacher_tokens": run.ledger["tokens"].get("teacher_tokens", 0)}
        before = {"new/accuracy before": run.evaluation["history"][0]["new/accuracy"]}
        rows.append(row(labels, run, NUMBERS) | tokens | {"first_half": half[0] if half else "never"} | before)
    bench.write(rows)
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read()
    print("New skill before:", spread([r["new/accuracy before"] for r in rows]))
    lines = []
    for name in ARMS:
        mine = picked(rows, arm=name)
        middle = [f"{mean(r[n] for r in mine):,.0f}" for n in ("student_tokens", "teacher_tokens")]
        first = ", ".join(str(r["first_half"]) for r in mine)
        lines.append([f"`{name}`", *(spread([r[n] for r in mine]) for n in NUMBERS), first, *middle])
    titles = ["new skill", "prior skills", "their native style", "new skill first >= 0.5 at update", "student tokens"]
    print("\nAfter 100 updates, mean and interval over seeds; mean tokens\n")
    print(table(["preset", *titles, "teacher tokens"], lines))
    print("\nDifference to `sft`, paired by seed\n")
    differences = ([f"`{a}`", *(paired(rows, a, "sft", n) for n in NUMBERS)] for a in ("sft_kl", "seqkd"))
    print(table(["preset", *titles[:3]], differences))
    print("\nDifference to `kd`, paired by seed\n")
    print(table(["preset", *titles[:3]], [["`kd_native`", *(paired(rows, "kd_native", "kd", n) for n in NUMBERS)]]))
    panels = {
        title: {name: [r[n] for r in picked(rows, arm=name)] for name in ARMS}
        for title, n in (("new skill", "new/accuracy"), ("prior skills", "prior/accuracy"))
    }
    dots(bench.results / "presets.png", panels, "accuracy after 100 updates")


if __name__ == "__main__":
    start(main, __file__, tell)
