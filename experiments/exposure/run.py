"""Does training on the teacher's or the data's prefixes leave a student that errs on its own, more so the longer the answer?

python -m experiments.exposure.run
"""

from itertools import pairwise, product
from pathlib import Path

from experiments.density.run import LONG
from experiments.exposure.positions import Positions
from experiments.figures import curves
from experiments.grid import Bench, Row, paired, row, spread, start, table
from opd_lightning.models import Pretrained, Student
from opd_lightning.tasks.world import WorldTask, world_tokenizer

OFF_POLICY = "rollout=teacher"
ARMS = {
    "sft": ["method=sft", "task.style=native"],
    "seqkd": ["method=seqkd"],
    "kd_forward": ["method=opd", OFF_POLICY, "loss/divergence=forward_kl"],
    "kd_reverse": ["method=opd", OFF_POLICY],
    "opd_forward": ["method=opd", "loss/divergence=forward_kl"],
    "opd_reverse": ["method=opd"],
}
SKILLS, SEEDS, MATCHED = ("rotate", "descend"), (0, 1, 2, 3, 4), (0.7, 0.9)
LENGTHS = {8: tuple(ARMS), 6: ("seqkd", "kd_reverse", "opd_reverse"), 4: ("seqkd", "kd_reverse", "opd_reverse")}
PAIRS = (  # who writes, at the same loss; and to SFT on the teacher's completions
    ("opd_reverse", "kd_reverse"),
    ("opd_forward", "kd_forward"),
    ("opd_reverse", "seqkd"),
    ("opd_forward", "seqkd"),
    ("kd_reverse", "seqkd"),
    ("kd_reverse", "kd_forward"),  # the loss, where the teacher writes and where the student does
    ("opd_reverse", "opd_forward"),
)
PROTOCOL = ["optim.lr=2e-4", "task.max_new_tokens=10", "task.n_eval=128"]
PROTOCOL += ["~evaluation.suite.teacher"]
PROTOCOL += ["+evaluation.suite.positions={_target_:experiments.exposure.positions.Positions,max_new_tokens:10}"]
UPDATES = {
    "rotate": ["evaluation.every=1", "trainer.max_steps=20"],
    "descend": ["evaluation.every=5", "trainer.max_steps=80"],
}
KINDS, NAMES = ("own", "right", "wrong"), ("step", "right", "gap", "last gap", "wrong")


def main(bench: Bench) -> None:
    folder = bench.starts({"long": LONG})["long"]
    only_a_teacher = ["--base", f"{folder}/start", "--steps", "0", "--skill", "descend", *LONG[2:]]
    teachers = {"rotate": folder} | bench.starts({"descend": only_a_teacher})
    cells = [
        (
            {"arm": arm, "skill": skill, "length": length, "seed": seed},
            [
                *ARMS[arm],
                f"name={arm}",
                f"task.skill={skill}",
                f"task.length={length}",
                f"seed={seed}",
                f"model.path={folder}/start",
                f"model.teacher={teachers[skill]}/teacher",
                *UPDATES[skill],
                *PROTOCOL,
            ],
        )
        for length, arms in LENGTHS.items()
        for skill, arm, seed in product(SKILLS, arms, SEEDS)
    ]
    rows, courses = [], []
    for labels, run in bench.run("exposure", cells):
        course = [{"step": float(h["step"])} | means(h) for h in run.evaluation["history"]]
        courses += [labels | at for at in course]
        rows.append(row(labels, run, ("new/accuracy", "prior/accuracy")))
        rows[-1].pop("reached")  # no run was asked to reach anything
        points = {f"at {m}": matched(course, m) for m in MATCHED} | {"at the end": course[-1]}
        rows[-1] |= {f"{name} {when}": value for when, point in points.items() for name, value in point.items()}
    whens = [*(f"at {m}" for m in MATCHED), "at the end"]
    for skill, length, when in product(SKILLS, LENGTHS, whens):
        mine = [r for r in rows if (r["skill"], r["length"]) == (skill, length) and f"gap {when}" in r]
        tables(f"{skill}, {length} digits, {when}", when, mine)
    for skill, when in product(SKILLS, whens):
        longer(skill, when, [r for r in rows if r["skill"] == skill and f"gap {when}" in r])
    bench.write(rows)
    bench.write([teacher(f / "teacher", skill, n) for skill, f in teachers.items() for n in LENGTHS], "teachers.csv")
    bench.write(courses, "courses.csv")
    for name, what in (("gap", "gap"), ("wrong", "right behind a wrong digit")):
        panels = {}
        for skill in SKILLS:
            mine = [c for c in courses if (c["skill"], c["length"]) == (skill, max(LENGTHS))]
            steps = sorted({c["step"] for c in mine})
            panels[skill] = {
                arm: {at: [c[name] for c in mine if (c["arm"], c["step"]) == (arm, at)] for at in steps} for arm in ARMS
            }
        curves(bench.results / f"{name}.png", panels, "updates", f"{what}, digits 2 to {max(LENGTHS)}", zero=name == "gap")


def tables(title: str, when: str, rows: list[Row]) -> None:
    """All arms at one point of the training, differences paired by seed, and the gap digit by digit."""
    if not rows:
        return
    length = rows[0]["length"]
    print(f"\n{title}, of digits 2 to the last\n")
    found = {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS}
    there = {arm: mine for arm, mine in found.items() if mine}
    print(
        table(
            ["", *NAMES], ([f"`{a}`", *(spread([r[f"{n} {when}"] for r in mine]) for n in NAMES)] for a, mine in there.items())
        )
    )
    pairs = [(a, b) for a, b in PAIRS if a in there and b in there]
    lines = ([f"`{a}` - `{b}`", *(paired(rows, a, b, f"{n} {when}") for n in ("gap", "wrong"))] for a, b in pairs)
    print(table(["paired by seed", "gap", "behind a wrong digit"], lines))
    digits = range(2, length + 1)
    gaps = {a: [[r[f"right {i} {when}"] - r[f"own {i} {when}"] for r in mine] for i in digits] for a, mine in there.items()}
    print(table(["gap at digit", *digits], ([f"`{a}`", *(spread(values) for values in some)] for a, some in gaps.items())))


def longer(skill: str, when: str, rows: list[Row]) -> None:
    """The gap and the digits behind a wrong one by length of the answer, and differences of lengths, paired by seed."""
    print(f"\n{skill}, {when}, by digits of the answer\n")
    lines, lengths = [], sorted(LENGTHS)
    pairs = [*((b, a) for a, b in pairwise(lengths)), (lengths[-1], lengths[0])]
    for arm, name in product(LENGTHS[lengths[0]], ("gap", "wrong")):
        mine = {n: [r[f"{name} {when}"] for r in rows if (r["arm"], r["length"]) == (arm, n)] for n in lengths}
        by_length = [r | {"arm": r["length"]} for r in rows if r["arm"] == arm]
        told = (paired(by_length, a, b, f"{name} {when}") for a, b in pairs)
        lines.append([f"`{arm}`", name, *(spread(v) if v else "" for v in mine.values()), *told])
    print(table(["", "", *(f"{n} digits" for n in lengths), *(f"{a} - {b}" for a, b in pairs)], lines))


def teacher(folder: Path, skill: str, length: int) -> Row:
    """The share of right digits, in the same three places, of a teacher."""
    measure = Positions(WorldTask(skill=skill, length=length, n_eval=128), world_tokenizer(), length + 2, n=128)
    found = means({name: told.value for name, told in measure(Student(Pretrained(str(folder)).model()), {}).items()})
    told = {"arm": "teacher", "skill": skill, "length": length} | {kind: found[kind] for kind in KINDS}
    print(f"\nthe teacher of {skill}, {length} digits:", *(f"{kind} {found[kind]:.3f}" for kind in KINDS))
    return told


def means(measured: Row) -> dict[str, float]:
    """The share of right digits by position and, over digits 2 to the last, on the whole."""
    length = max(int(key.split("/")[1]) for key in measured if key.startswith("position/"))
    by = {f"{kind} {i}": measured[f"position/{i}/{kind}"] for kind in KINDS for i in range(2, length + 1)}
    mean = {kind: sum(by[f"{kind} {i}"] for i in range(2, length + 1)) / (length - 1) for kind in KINDS}
    return by | mean | {"gap": mean["right"] - mean["own"], "last gap": by[f"right {length}"] - by[f"own {length}"]}


def matched(course: list[dict[str, float]], m: float) -> dict[str, float]:
    """All numbers where the share behind right digits passes m for the first time, between two measurements linearly."""
    for before, after in pairwise(course):
        if before["right"] < m <= after["right"]:
            share = (m - before["right"]) / (after["right"] - before["right"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return {}


if __name__ == "__main__":
    start(main, __file__)
