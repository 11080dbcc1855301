"""Three skills one after another: what is left of the earlier ones, by SFT and by self-distillation?

python -m experiments.sequential.run
"""

from itertools import product
from pathlib import Path
from statistics import mean

from experiments.figures import curves
from experiments.grid import SHIPPED as SHIPPED_FOLDER
from experiments.grid import Bench, Row, between, paired, picked, row, spread, start, table
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
AFTER = range(1, len(STAGES) + 1)
# The shipped model answers all unseen operations alike; this one has gone on to guess at each of them by itself.
APART = ["--base", str(SHIPPED_FOLDER / "start"), "--steps", "1000", "--teacher-steps", "0", "--guess", "0.3"]
EARLIER = "apart, first machine"  # in earlier.csv: what these options gave on another kind of processor
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
    tell(bench)


def tell(bench: Bench) -> None:
    rows, earlier = bench.read(), bench.earlier()
    for name in dict.fromkeys(r["start"] for r in rows + earlier):
        mine = picked(rows + earlier, start=name)
        asked_to_rotate(name, mine)
        ends(name, mine)
        prior_skills(name, mine)
        along(name, mine)
    for name in dict.fromkeys(r["start"] for r in rows):
        drawn(bench.results / f"{name}.png", picked(rows, start=name, lr=RATES[0]))
    teachers(rows + earlier)
    if earlier:
        makings(rows + earlier)


def right_shown(path: str, skill: str, style: str) -> float:
    """How well a model does the next skill when it is shown the demonstration: greedy, 128 validation prompts."""
    return right_greedy(path, WorldTask(skill=skill, style=style, n_eval=128), shown=True)


def prior(one: Row, skill: str) -> Row:
    """The prior skills' numbers under names that do not tell the skill just taught."""
    names = {f"{skill}/prior/{what}": f"prior/{what}" for what in ("accuracy", "format")}
    return {names.get(name, name): value for name, value in one.items()}


def columns() -> dict[str, str]:
    """Titles and names of what is told after each stage."""
    return {s: f"{s}/new/accuracy" for s, _ in STAGES} | {"prior skills": "prior/accuracy", "native style": "prior/format"}


def runs_of(rows: list[Row]) -> list[tuple[str, str]]:
    """Methods and rates."""
    return list(dict.fromkeys((r["arm"], r["lr"]) for r in rows))


def compared(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Which methods are told beside which, at which rate."""
    others = (("sdft_original", "sft_native"), ("sdft", "sdft_original"))
    told = [(arm, "sft", rate) for arm, rate in runs_of(rows) if arm != "sft"]
    return told + [(a, b, rate) for a, b in others for arm, rate in runs_of(rows) if arm == a]


def asked_to_rotate(name: str, rows: list[Row]) -> None:
    """What becomes of the first skill, over all runs."""
    print(f"\n{name}: asked to rotate after each stage, over all runs\n")
    found = {stage: picked(rows, stage=stage) for stage in AFTER}
    right = {stage: [r["rotate/new/accuracy"] for r in some] for stage, some in found.items()}
    lines = [
        ["rotates: least, greatest", *(f"{min(values):.3f}, {max(values):.3f}" for values in right.values())],
        ["carries out the skill just taught: mean", *(f"{mean(r['rotate as taught'] for r in f):.3f}" for f in found.values())],
    ]
    print(table(["", *found], lines))


def ends(name: str, rows: list[Row]) -> None:
    """What is left after the last stage, and its differences."""
    last, numbers = picked(rows, stage=len(STAGES)), columns()
    print(f"\n{name}: after the last stage, mean and interval over seeds; runs at 0.95 in all stages; mean of all updates\n")
    told = []
    for arm, rate in runs_of(rows):
        mine = picked(rows, arm=arm, lr=rate)
        reached = [all(r["reached"] for r in picked(mine, seed=seed)) for seed in dict.fromkeys(r["seed"] for r in mine)]
        left = (spread([r[c] for r in picked(mine, stage=len(STAGES))]) for c in numbers.values())
        told.append([f"`{arm}`", rate, *left, sum(reached), f"{sum(r['updates'] for r in mine) / len(reached):.0f}"])
    print(table(["method", "rate", *numbers, "reached", "updates"], told))
    print(f"\n{name}: differences after the last stage, paired by seed\n")
    lines = (
        [f"`{a}` - `{b}`", rate, *(paired(picked(last, lr=rate), a, b, c) for c in numbers.values())]
        for a, b, rate in compared(rows)
    )
    print(table(["", "rate", *numbers], lines))


def prior_skills(name: str, rows: list[Row]) -> None:
    """Differences in the prior skills that are left, stage by stage."""
    print(f"\n{name}: differences in prior skills after each stage, paired by seed\n")
    lines = (
        [f"`{a}` - `{b}`", rate, *(paired(picked(rows, lr=rate, stage=s), a, b, "prior/accuracy") for s in AFTER)]
        for a, b, rate in compared(rows)
    )
    print(table(["", "rate", *(f"after {s}" for s, _ in STAGES)], lines))


def along(name: str, rows: list[Row]) -> None:
    """Means along the stages."""
    print(f"\n{name}: means along the stages, and each seed's teacher's greedy accuracy when shown the demonstrations\n")
    told = []
    for (arm, rate), stage in product(runs_of(rows), (0, *AFTER)):
        mine = picked(rows, arm=arm, lr=rate, stage=stage)
        means = (f"{mean(r[c] for r in mine):.3f}" for c in columns().values())
        seen = ", ".join(f"{r['teacher shown']:.3f}" for r in mine if "teacher shown" in r)
        told.append([f"`{arm}`", rate, stage, f"{mean(r['updates'] for r in mine):.0f}", *means, seen])
    print(table(["method", "rate", "after stage", "updates", *columns(), "teacher, shown"], told))


def drawn(path: Path, rows: list[Row]) -> None:
    """A panel per skill, along the stages."""
    panels = {
        title: {arm: {s: [r[c] for r in picked(rows, arm=arm, stage=s)] for s in (0, *AFTER)} for arm in ARMS}
        for title, c in columns().items()
        if title != "native style"
    }
    stages = "after stage (" + ", ".join(f"{n}: {s}" for n, (s, _) in enumerate(STAGES, 1)) + ")"
    curves(path, panels, stages, "accuracy (greedy, test prompts)", columns=2)


def teachers(rows: list[Row]) -> None:
    """The teacher that moves along beside its students, seed by seed."""
    print("\n`sdft`: its teacher, shown the demonstrations, and the student after the stage, each seed\n")
    told = []
    for (name, rate), stage in product(dict.fromkeys((r["start"], r["lr"]) for r in rows), AFTER):
        mine = picked(rows, arm="sdft", start=name, lr=rate, stage=stage)
        skill = STAGES[stage - 1][0]
        pairs = ([r["teacher shown"] for r in mine], [r[f"{skill}/new/accuracy"] for r in mine])
        told.append([name, rate, skill, *(", ".join(f"{v:.3f}" for v in some) for some in pairs), spread(pairs[1])])
    print(table(["start model", "rate", "skill", "teacher, shown", "student", "mean"], told))


def makings(rows: list[Row]) -> None:
    """How far the runs from the two makings of one start model lie apart, and how many of them are alike in every column."""
    new, old = {"start": "apart"}, {"start": EARLIER}
    print("\n`apart` less its making on the first machine, mean and interval over seeds; runs that are alike in every column\n")
    told = []
    for arm, stage in product(ARMS, AFTER):
        mine = picked(rows, arm=arm, lr=RATES[0], stage=stage)
        again = [r | old in mine for r in picked(mine, **new)]
        told.append(
            [f"`{arm}`", stage, *(between(mine, new, old, c) for c in columns().values()), f"{sum(again)} of {len(again)}"]
        )
    print(table(["method", "after stage", *columns(), "alike"], told))


if __name__ == "__main__":
    start(main, __file__, tell)
