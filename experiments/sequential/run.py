"""Three skills one after another: what is left of the earlier ones, by SFT and by self-distillation?

python -m experiments.sequential.run
"""

from itertools import product
from statistics import mean

from experiments.figures import curves
from experiments.grid import SHIPPED as SHIPPED_FOLDER
from experiments.grid import Bench, Row, paired, row, spread, start, table
from experiments.likely import right_greedy
from experiments.sequential.confusion import carried_out
from opd_lightning.tasks.world import WorldTask

STAGES = (("rotate", "listed"), ("swap", "closed"), ("complement", "listed"))
SHIPPED = "pkg://opd_lightning/assets/world/start"
ARMS = {
    "sft": ["method=sft"],
    "sft_native": ["method=sft", "task.style=native"],
    "sdft": ["method=sdft"],  # its teacher is the model as it was before this stage
    "sdft_original": ["method=sdft", "teacher=external"],  # the model as it was before all stages
}
RATES, SEEDS = ("5e-5", "2e-4"), (0, 1, 2)
# The shipped model answers all unseen operations alike; this one has gone on to guess at each of them by itself.
APART = ["--base", str(SHIPPED_FOLDER / "start"), "--steps", "1000", "--teacher-steps", "0", "--guess", "0.3"]
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
    begin = {"shipped": SHIPPED, "apart": f"{bench.starts({'apart': APART}, last='start')['apart']}/start"}
    before = {
        (name, arm, rate, seed): path
        for (name, path), arm, rate, seed in product(begin.items(), ARMS, RATES, SEEDS)
        if name == "shipped" or rate == RATES[0]
    }
    rows: list[Row] = []
    for stage, (skill, style) in enumerate(STAGES, 1):
        cells = [
            (
                {"arm": arm, "start": name, "lr": rate, "seed": seed, "stage": stage, "taught": skill},
                [
                    f"task.style={style}",
                    *ARMS[arm],
                    f"name={arm}",
                    f"model.path={path}",
                    *([f"teacher.path={begin[name]}"] if arm == "sdft_original" else []),
                    f"task.skill={skill}",
                    f"optim.lr={rate}",
                    f"seed={seed}",
                    *PROTOCOL,
                    *(asked(s) for s, _ in STAGES),
                ],
            )
            for (name, arm, rate, seed), path in before.items()
        ]
        shown = {path: right_shown(path, skill, style) for path in {*before.values(), *begin.values()}}
        runs = bench.run(f"sequential-{stage}", cells)
        names = [f"{s}/new/{what}" for s, _ in STAGES for what in ("accuracy", "format")]
        names += [f"{skill}/prior/accuracy", f"{skill}/prior/format"]
        for labels, run in runs:
            key = labels["start"], labels["arm"], labels["lr"], labels["seed"]
            if stage == 1:
                begun = {n: run.evaluation["start"].get(n) for n in names}
                rows.append(prior(labels | {"stage": 0, "taught": "", "updates": 0, "reached": True} | begun, skill))
            one = prior(row(labels, run, names), skill)
            one["rotate as taught"] = carried_out(run.folder, "rotate").get(skill, 0.0)
            teacher = {"sdft": before[key], "sdft_original": begin[labels["start"]]}.get(labels["arm"])
            one["teacher shown"] = None if teacher is None else shown[teacher]
            rows.append(one)
        before = {(c["start"], c["arm"], c["lr"], c["seed"]): str(run.folder) for c, run in runs}
    bench.write(rows)
    for name in dict.fromkeys(r["start"] for r in rows):
        tables(name, [r for r in rows if r["start"] == name])
    for name in begin:
        mine = [r for r in rows if (r["lr"], r["start"]) == (RATES[0], name)]
        panels = {
            title: {arm: {s: [r[c] for r in mine if (r["arm"], r["stage"]) == (arm, s)] for s in range(4)} for arm in ARMS}
            for title, c in columns().items()
            if title != "native style"
        }
        stages = "after stage (" + ", ".join(f"{n}: {s}" for n, (s, _) in enumerate(STAGES, 1)) + ")"
        curves(bench.results / f"{name}.png", panels, stages, "accuracy (greedy, test prompts)")


def right_shown(path: str, skill: str, style: str) -> float:
    """How well a model does the next skill when it is shown the demonstration: greedy, 128 validation prompts."""
    return right_greedy(path, WorldTask(skill=skill, style=style, n_eval=128), shown=True)


def prior(one: Row, skill: str) -> Row:
    """The prior skills' numbers under names that do not tell the skill just taught."""
    return one | {f"prior/{what}": one.pop(f"{skill}/prior/{what}") for what in ("accuracy", "format")}


def columns() -> dict[str, str]:
    """Titles and names of what is told after each stage."""
    return {s: f"{s}/new/accuracy" for s, _ in STAGES} | {"prior skills": "prior/accuracy", "native style": "prior/format"}


def tables(name: str, rows: list[Row]) -> None:
    """What is left after the last stage, and differences to `sft`."""
    last = [r for r in rows if r["stage"] == len(STAGES)]
    numbers = columns()
    keys = list(dict.fromkeys((r["arm"], r["lr"]) for r in last))
    print(f"\n{name}: asked to rotate after stages 1, 2 and 3, carries out the skill just taught (mean over all runs)\n")
    print(*(f"{mean(r['rotate as taught'] for r in rows if r['stage'] == stage):.3f}" for stage in (1, 2, 3)))
    print(f"\n{name}: after the last stage, mean and interval over seeds; runs that reached 0.95 in all stages\n")
    told = []
    for arm, rate in keys:
        mine = [r for r in last if (r["arm"], r["lr"]) == (arm, rate)]
        reached = [all(r["reached"] for r in rows if (r["arm"], r["lr"], r["seed"]) == (arm, rate, s)) for s in SEEDS]
        told.append([f"`{arm}`", rate, *(spread([r[c] for r in mine]) for c in numbers.values()), sum(reached)])
    print(table(["method", "rate", *numbers, "reached"], told))
    print(f"\n{name}: difference to `sft` after the last stage, paired by seed\n")
    lines = (
        [f"`{arm}`", rate, *(paired([r for r in last if r["lr"] == rate], arm, "sft", c) for c in numbers.values())]
        for arm, rate in keys
        if arm != "sft"
    )
    print(table(["method", "rate", *numbers], lines))
    print(f"\n{name}: means along the stages, and each seed's teacher's greedy accuracy when shown the demonstrations\n")
    told = []
    for arm, rate in keys:
        for stage in range(len(STAGES) + 1):
            mine = [r for r in rows if (r["arm"], r["lr"], r["stage"]) == (arm, rate, stage)]
            seen = ", ".join(f"{r['teacher shown']:.3f}" for r in mine if r.get("teacher shown") is not None)
            updates = f"{mean(r['updates'] for r in mine):.0f}"
            told.append(
                [f"`{arm}`", rate, stage, updates, *(f"{mean(r[c] for r in mine):.3f}" for c in numbers.values()), seen]
            )
    print(table(["method", "rate", "after stage", "updates", *numbers, "teacher, shown"], told))


if __name__ == "__main__":
    start(main, __file__)
