"""Does training on the teacher's or the data's prefixes leave a student that errs on its own, more so the longer the answer?

python -m experiments.exposure.run
"""

from itertools import pairwise, product
from pathlib import Path
from statistics import mean

from experiments.density.run import LONG
from experiments.exposure.positions import Positions
from experiments.figures import curves
from experiments.grid import Bench, Row, between, paired, picked, row, spread, start, table
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
    ("sft", "seqkd"),  # the data's completions or the teacher's
)
PROTOCOL = ["optim.lr=2e-4", "task.max_new_tokens=10", "task.n_eval=128"]
PROTOCOL += ["~evaluation.suite.teacher"]
PROTOCOL += ["+evaluation.suite.positions={_target_:experiments.exposure.positions.Positions,max_new_tokens:10}"]
UPDATES = {
    "rotate": ["evaluation.every=1", "trainer.max_steps=20"],
    "descend": ["evaluation.every=5", "trainer.max_steps=80"],
}
KINDS, NAMES = ("own", "right", "wrong"), ("step", "right", "gap", "last gap", "wrong")
WHENS = (*(f"at {m}" for m in MATCHED), "at the end")
LATE, LATER = (0.95, 0.98, 0.99), range(9, 21)  # levels and updates of `rotate` that were chosen after the results


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
        points = {f"at {m}": matched(course, m) for m in MATCHED} | {"at the end": course[-1]}
        rows[-1] |= {f"{name} {when}": value for when, point in points.items() for name, value in point.items()}
    bench.write(rows)
    bench.write([teacher(f / "teacher", skill, n) for skill, f in teachers.items() for n in LENGTHS], "teachers.csv")
    bench.write(courses, "courses.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows, courses = bench.read(), bench.read("courses.csv")
    print("\nThe teachers, of digits 2 to the last\n")
    names = ("skill", "length", *KINDS)
    print(table(names, ([t["skill"], t["length"], *(f"{t[kind]:.3f}" for kind in KINDS)] for t in bench.read("teachers.csv"))))
    for skill, length, when in product(SKILLS, LENGTHS, WHENS):
        mine = [r for r in picked(rows, skill=skill, length=length) if f"gap {when}" in r]
        tables(f"{skill}, {length} digits, {when}", when, mine)
    longer(rows)
    expected(rows)
    largest(courses)
    on_the_way(picked(courses, skill="descend"))
    order_turns(picked(courses, skill="rotate", length=8))
    longest = [(skill, max(LENGTHS)) for skill in SKILLS]
    drawn(bench.results / "gap.png", "gap", "gap", longest, courses)
    shorter = [("descend", length) for length in LENGTHS if length < max(LENGTHS)]
    drawn(bench.results / "wrong.png", "wrong", "right behind a wrong digit", [*longest, *shorter], courses)


def tables(title: str, when: str, rows: list[Row]) -> None:
    """All arms at one point of the training, differences paired by seed, and the gap digit by digit."""
    if not rows:
        return
    length, at_the_end = rows[0]["length"], when == WHENS[-1]
    whole = {"whole answers": "new/accuracy"} if at_the_end else {}
    print(f"\n{title}, of digits 2 to the last{'; of whole answers, digit 1 included' if at_the_end else ''}\n")
    there = {arm: mine for arm in ARMS if (mine := picked(rows, arm=arm))}
    columns = {name: f"{name} {when}" for name in NAMES} | whole
    lines = ([f"`{a}`", *(spread([r[c] for r in mine]) for c in columns.values())] for a, mine in there.items())
    print(table(["", *columns], lines))
    pairs = [(a, b) for a, b in PAIRS if a in there and b in there]
    # Where arms are compared at equal skill, digits behind right ones are right equally often.
    names = ("right", "own", "gap", "wrong") if at_the_end else ("gap", "wrong")
    columns = {name: f"{name} {when}" for name in names} | whole
    lines = ([f"`{a}` - `{b}`", *(paired(rows, a, b, c) for c in columns.values())] for a, b in pairs)
    print(table(["paired by seed", *columns], lines))
    digits = range(2, length + 1)
    gaps = {a: [[r[f"right {i} {when}"] - r[f"own {i} {when}"] for r in mine] for i in digits] for a, mine in there.items()}
    print(table(["gap at digit", *digits], ([f"`{a}`", *(spread(values) for values in some)] for a, some in gaps.items())))


def longer(rows: list[Row]) -> None:
    """The gap and the digits behind a wrong one by length of the answer, and differences of lengths, paired by seed."""
    lines, lengths = [], sorted(LENGTHS)
    pairs = [*((b, a) for a, b in pairwise(lengths)), (lengths[-1], lengths[0])]
    for skill, when, arm, name in product(SKILLS, WHENS, LENGTHS[lengths[0]], ("gap", "wrong")):
        number, mine = f"{name} {when}", picked(rows, skill=skill, arm=arm)
        found = ([r[number] for r in picked(mine, length=n) if number in r] for n in lengths)
        told = (between(mine, {"length": a}, {"length": b}, number) for a, b in pairs)
        lines.append([f"`{arm}`", f"`{skill}` {when}", name, *(spread(v) if v else "" for v in found), *told])
    print("\nBy digits of the answer, differences of lengths paired by seed\n")
    print(table(["", "", "", *(f"{n} digits" for n in lengths), *(f"{a} - {b}" for a, b in pairs)], lines))


def expected(rows: list[Row]) -> None:
    """Do the gap and the loss behind a wrong digit grow less with length for `opd_reverse` than for `seqkd`?"""
    short, long = min(LENGTHS), max(LENGTHS)
    before = {(r["skill"], r["arm"], r["seed"]): r for r in picked(rows, length=short)}
    numbers, changes = [f"{name} {when}" for name, when in product(("gap", "wrong"), WHENS)], []
    for r in picked(rows, length=long):
        other = before.get((r["skill"], r["arm"], r["seed"]), {})
        changed = {n: r[n] - other[n] for n in numbers if n in r and n in other}
        changes.append({"skill": r["skill"], "arm": r["arm"], "seed": r["seed"]} | changed)
    print(f"\nChange from {short} digits to {long}: `opd_reverse` - `seqkd`, paired by seed\n")
    lines = []
    for skill, when in product(SKILLS, WHENS):
        mine = picked(changes, skill=skill)
        lines.append([f"`{skill}` {when}", *(paired(mine, "opd_reverse", "seqkd", f"{n} {when}") for n in ("gap", "wrong"))])
    print(table(["", "gap", "behind a wrong digit"], lines))


def largest(courses: list[Row]) -> None:
    """How large the gap becomes while arms learn."""
    print("\nThe largest gap of an arm's mean at any measurement\n")
    lines = []
    for skill, length in product(SKILLS, sorted(LENGTHS)):
        mine = picked(courses, skill=skill, length=length)
        points = dict.fromkeys((c["arm"], c["step"]) for c in mine)
        gaps = {(a, at): mean(c["gap"] for c in picked(mine, arm=a, step=at)) for a, at in points}
        if gaps:
            arm, step = max(gaps, key=gaps.get)
            lines.append([f"`{skill}`", f"{length} digits", f"`{arm}`", f"{step:g}", f"{gaps[arm, step]:.4f}"])
    print(table(["", "", "", "update", "gap"], lines))


def on_the_way(descend: list[Row]) -> None:
    """Who is ahead before the end, and what is lost again behind a wrong digit: updates chosen when the curves were seen."""
    print("\n`descend`, right behind a wrong digit at updates 35 and 80, and its changes, paired by seed\n")
    lines = []
    for length, arm in ((length, arm) for length, arms in LENGTHS.items() for arm in arms):
        mine = picked(descend, length=length, arm=arm)
        values = ([c["wrong"] for c in picked(mine, step=at)] for at in (35, 80))
        changes = (between(mine, {"step": 80}, {"step": at}, "wrong") for at in (35, 45, 75))
        lines.append([f"{length} digits", f"`{arm}`", *(spread(some) if some else "" for some in values), *changes])
    print(table(["", "", "35", "80", "80 - 35", "80 - 45", "80 - 75"], lines))
    print("\n`descend`, 8 digits: differences to `seqkd`, paired by seed\n")
    lines = []
    for arm, at in product(("kd_reverse", "opd_reverse", "opd_forward"), (35, 40, 45, 50)):
        mine = picked(descend, length=8, step=at)
        lines.append([f"`{arm}`", at, *(paired(mine, arm, "seqkd", name) for name in ("right", "gap"))])
    print(table(["", "update", "right", "gap"], lines))
    print("\n`descend` at update 50, 8 digits - 4, paired by seed\n")
    lines = []
    for arm in LENGTHS[4]:
        mine = picked(descend, arm=arm, step=50)
        lines.append([f"`{arm}`", *(between(mine, {"length": 8}, {"length": 4}, name) for name in ("right", "wrong"))])
    print(table(["", "right", "behind a wrong digit"], lines))


def order_turns(rotate: list[Row]) -> None:
    """`rotate` past 0.9, behind a wrong digit: where as many digits are right behind right ones, and after as many updates."""
    at_equal = []
    for arm, seed, level in product(("seqkd", "opd_reverse"), SEEDS, LATE):
        course = [{name: c[name] for name in ("step", "right", "wrong")} for c in picked(rotate, arm=arm, seed=seed)]
        at_equal.append({"arm": arm, "seed": seed, "level": level} | matched(course, level))
    print("\n`rotate`, 8 digits: `opd_reverse` - `seqkd`, paired by seed; levels and updates chosen after the results\n")
    arms = ("opd_reverse", "seqkd")
    lines = [[f"at {m}", "", paired(picked(at_equal, level=m), *arms, "wrong")] for m in LATE]
    lines += [[f"update {at}", *(paired(picked(rotate, step=at), *arms, n) for n in ("right", "wrong"))] for at in LATER]
    print(table(["", "right", "behind a wrong digit"], lines))


def drawn(path: Path, name: str, what: str, shown: list[tuple[str, int]], courses: list[Row]) -> None:
    """A number along the training, a panel per skill and length."""
    panels = {}
    for skill, length in shown:
        mine = picked(courses, skill=skill, length=length)
        steps = sorted({c["step"] for c in mine})
        panels[f"{skill}, {length} digits"] = {
            arm: {at: [c[name] for c in picked(mine, arm=arm, step=at)] for at in steps} for arm in ARMS
        }
    curves(path, panels, "updates", f"{what}, digits 2 to the last", zero=name == "gap", columns=2)


def teacher(folder: Path, skill: str, length: int) -> Row:
    """The share of right digits, in the same three places, of a teacher."""
    measure = Positions(WorldTask(skill=skill, length=length, n_eval=128), world_tokenizer(), length + 2, n=128)
    found = means({name: told.value for name, told in measure(Student(Pretrained(str(folder)).model()), {}).items()})
    return {"arm": "teacher", "skill": skill, "length": length} | {kind: found[kind] for kind in KINDS}


def means(measured: Row) -> dict[str, float]:
    """The share of right digits by position and, over digits 2 to the last, on the whole."""
    length = max(int(key.split("/")[1]) for key in measured if key.startswith("position/"))
    by = {f"{kind} {i}": measured[f"position/{i}/{kind}"] for kind in KINDS for i in range(2, length + 1)}
    overall = {kind: sum(by[f"{kind} {i}"] for i in range(2, length + 1)) / (length - 1) for kind in KINDS}
    gaps = {"gap": overall["right"] - overall["own"], "last gap": by[f"right {length}"] - by[f"own {length}"]}
    return by | overall | gaps


def matched(course: list[dict[str, float]], m: float) -> dict[str, float]:
    """All numbers where the share behind right digits passes m for the first time, between two measurements linearly."""
    for before, after in pairwise(course):
        if before["right"] < m <= after["right"]:
            share = (m - before["right"]) / (after["right"] - before["right"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return {}


if __name__ == "__main__":
    start(main, __file__, tell)
