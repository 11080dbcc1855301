"""Three skills one after another: what is left of the earlier ones, by SFT and by self-distillation?

python -m experiments.sequential.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, paired, row, spread, start, table

STAGES = (("rotate", "listed"), ("swap", "closed"), ("complement", "listed"))
SHIPPED = "pkg://opd_lightning/assets/world/start"
ARMS = {
    "sft": ["method=sft"],
    "sft_native": ["method=sft", "task.style=native"],
    "sdft": ["method=sdft"],  # its teacher is the model as it was before this stage
    "sdft_original": ["method=sdft", "teacher=external", f"teacher.path={SHIPPED}"],  # the model as it was before all stages
}
RATES, SEEDS = ("5e-5", "2e-4"), (0, 1, 2)
PROTOCOL = ["evaluation=validation", "evaluation.every=10", "budget.accuracy=0.95", "budget.in_a_row=1"]
PROTOCOL += ["trainer.max_steps=150", "task.n_eval=128"]


def asked(skill: str) -> str:
    """An evaluation of one skill on test prompts, before and after a stage."""
    task = f"{{_target_:opd_lightning.tasks.world.WorldTask,skill:{skill},n_eval:${{task.n_eval}}}}"
    return (
        f"+evaluation.suite.{skill}={{_target_:opd_lightning.evaluation.GreedyAccuracy,task:{task},prefix:{skill}/,"
        "split:test,max_new_tokens:12}"
    )


def main(bench: Bench) -> None:
    before = {(arm, rate, seed): SHIPPED for arm, rate, seed in product(ARMS, RATES, SEEDS)}
    rows = []
    for stage, (skill, style) in enumerate(STAGES, 1):
        cells = [
            (
                {"arm": arm, "lr": rate, "seed": seed, "stage": stage, "taught": skill},
                [
                    f"task.style={style}",
                    *ARMS[arm],
                    f"name={arm}",
                    f"model.path={path}",
                    f"task.skill={skill}",
                    f"optim.lr={rate}",
                    f"seed={seed}",
                    *PROTOCOL,
                    *(asked(s) for s, _ in STAGES),
                ],
            )
            for (arm, rate, seed), path in before.items()
        ]
        runs = bench.run(f"sequential-{stage}", cells)
        names = [f"{s}/new/{what}" for s, _ in STAGES for what in ("accuracy", "format")]
        names += [f"{skill}/prior/accuracy", f"{skill}/prior/format"]
        found = [row(labels, run, names) for labels, run in runs]
        for one in found:
            one["prior/accuracy"], one["prior/format"] = (one.pop(f"{skill}/prior/{w}") for w in ("accuracy", "format"))
        rows += found
        before = {(c["arm"], c["lr"], c["seed"]): str(run.folder) for c, run in runs}
    bench.write(rows)
    taught = [s for s, _ in STAGES]
    for row_ in rows:
        learned = [row_[f"{s}/new/accuracy"] for s in taught[: row_["stage"]]]
        row_["all"] = (sum(learned) / len(learned) + row_["prior/accuracy"]) / 2
    bench.write(rows)
    last = [r for r in rows if r["stage"] == len(STAGES)]
    columns = {s: f"{s}/new/accuracy" for s in taught} | {"prior skills": "prior/accuracy", "native style": "prior/format"}
    print("After the last stage, mean and interval over seeds\n")
    keys = list(dict.fromkeys((r["arm"], r["lr"]) for r in last))
    print(
        table(
            ["method", "rate", *columns, "reached all"],
            (
                [
                    f"`{arm}`",
                    rate,
                    *(spread([r[c] for r in last if (r["arm"], r["lr"]) == (arm, rate)]) for c in columns.values()),
                    sum(all(r["reached"] for r in rows if (r["arm"], r["lr"], r["seed"]) == (arm, rate, s)) for s in SEEDS),
                ]
                for arm, rate in keys
            ),
        )
    )
    print("\nDifference to `sft` after the last stage, paired by seed\n")
    lines = (
        [f"`{arm}`", rate, *(paired([r for r in last if r["lr"] == rate], arm, "sft", c) for c in columns.values())]
        for arm, rate in keys
        if arm != "sft"
    )
    print(table(["method", "rate", *columns], lines))
    picture(bench, rows)


def picture(bench: Bench, rows) -> None:
    """Accuracy of the first skill and of the prior ones after each stage."""
    panels = {}
    for rate, (name, column) in product(RATES, (("rotate", "rotate/new/accuracy"), ("prior skills", "prior/accuracy"))):
        mine = [r for r in rows if r["lr"] == rate]
        panels[f"{name}, rate {rate}"] = {
            arm: {s: [r[column] for r in mine if (r["arm"], r["stage"]) == (arm, s)] for s in range(1, len(STAGES) + 1)}
            for arm in ARMS
        }
    curves(bench.results / "stages.png", panels, "after stage", "accuracy (greedy, test prompts)")


if __name__ == "__main__":
    start(main, __file__)
