"""Does training on the teacher's or the data's prefixes leave a student that errs on its own, more so the longer the answer?

python -m experiments.exposure.run
"""

from itertools import product
from pathlib import Path

from experiments.density.run import LONG
from experiments.exposure.positions import KINDS, Positions, matched, means
from experiments.exposure.tables import END, MATCHED, WHOLE, tables
from experiments.figures import curves
from experiments.grid import Bench, Row, picked, row, start, table
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
SKILLS, SEEDS = ("rotate", "descend"), (0, 1, 2, 3, 4)
LENGTHS = {8: tuple(ARMS), 6: ("seqkd", "kd_reverse", "opd_reverse"), 4: ("seqkd", "kd_reverse", "opd_reverse")}
PROTOCOL = ["optim.lr=2e-4", "task.max_new_tokens=10", "task.n_eval=128"]
PROTOCOL += ["~evaluation.suite.teacher"]
PROTOCOL += ["+evaluation.suite.positions={_target_:experiments.exposure.positions.Positions,max_new_tokens:10}"]
UPDATES = {
    "rotate": ["evaluation.every=1", "trainer.max_steps=20"],
    "descend": ["evaluation.every=5", "trainer.max_steps=80"],
}


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
        rows.append(row(labels, run, (WHOLE, "prior/accuracy")))
        points = {f"at {m}": matched(course, m) for m in MATCHED} | {END: course[-1]}
        rows[-1] |= {f"{name} {when}": value for when, point in points.items() for name, value in point.items()}
    bench.write(rows)
    bench.write([teacher(f / "teacher", skill, n) for skill, f in teachers.items() for n in LENGTHS], "teachers.csv")
    bench.write(courses, "courses.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows, courses = of_both(bench, "results.csv", "earlier.csv"), of_both(bench, "courses.csv", "earlier_courses.csv")
    print("\nThe teachers, of digits 2 to the last\n")
    names = ("skill", "length", *KINDS)
    print(table(names, ([t["skill"], t["length"], *(f"{t[kind]:.3f}" for kind in KINDS)] for t in bench.read("teachers.csv"))))
    tables(rows, courses)
    longest = [(skill, max(LENGTHS)) for skill in SKILLS]
    shorter = [("descend", length) for length in LENGTHS if length < max(LENGTHS)]
    kept = picked(courses, start="kept")
    drawn(bench.results / "gap.png", "gap", "gap", longest, kept)
    drawn(bench.results / "wrong.png", "wrong", "right behind a wrong digit", [*longest, *shorter], kept)


def of_both(bench: Bench, name: str, earlier: str) -> list[Row]:
    """The rows of both start models: the kept one's, which `main` writes, and those of the first, which is not kept."""
    return [{"start": "kept"} | r for r in bench.read(name)] + [{"start": "first"} | r for r in bench.earlier(earlier)]


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


if __name__ == "__main__":
    start(main, __file__, tell)
