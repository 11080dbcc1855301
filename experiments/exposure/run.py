"""Does training on the teacher's or the data's prefixes leave a student that errs on its own, more so the longer the answer?

python -m experiments.exposure.run
"""

from itertools import pairwise, product

from experiments.density.run import LONG
from experiments.figures import curves
from experiments.grid import Bench, Row, paired, row, spread, start, table

OFF_POLICY = "rollout=teacher"
ARMS = {
    "sft": ["method=sft", "task.style=native"],
    "seqkd": ["method=seqkd"],
    "kd_forward": ["method=opd", OFF_POLICY, "loss/divergence=forward_kl"],
    "kd_reverse": ["method=opd", OFF_POLICY],
    "opd_forward": ["method=opd", "loss/divergence=forward_kl"],
    "opd_reverse": ["method=opd"],
}
SKILLS, SEEDS, LENGTH, MATCHED = ("rotate", "descend"), (0, 1, 2), 8, (0.7, 0.9)
PROTOCOL = ["optim.lr=2e-4", f"task.length={LENGTH}", "task.max_new_tokens=10", "task.n_eval=128"]
PROTOCOL += ["~evaluation.suite.teacher"]
PROTOCOL += ["+evaluation.suite.positions={_target_:experiments.exposure.positions.Positions,max_new_tokens:10}"]
UPDATES = {
    "rotate": ["evaluation.every=2", "trainer.max_steps=20"],
    "descend": ["evaluation.every=5", "trainer.max_steps=80"],
}
KINDS, NAMES = ("own", "right", "wrong"), ("step", "gap", "last gap", "wrong")


def main(bench: Bench) -> None:
    folder = bench.starts({"long": LONG})["long"]
    only_a_teacher = ["--base", f"{folder}/start", "--steps", "0", "--skill", "descend", *LONG[2:]]
    teachers = {"rotate": folder} | bench.starts({"descend": only_a_teacher})
    cells = [
        (
            {"arm": arm, "skill": skill, "seed": seed},
            [
                *ARMS[arm],
                f"name={arm}",
                f"task.skill={skill}",
                f"seed={seed}",
                f"model.path={folder}/start",
                f"model.teacher={teachers[skill]}/teacher",
                *UPDATES[skill],
                *PROTOCOL,
            ],
        )
        for skill, arm, seed in product(SKILLS, ARMS, SEEDS)
    ]
    rows, courses = [], []
    for labels, run in bench.run("exposure", cells):
        course = [{"step": float(h["step"])} | means(h) for h in run.evaluation["history"]]
        courses += [labels | at for at in course]
        rows.append(row(labels, run, ("new/accuracy", "prior/accuracy")))
        rows[-1] |= {f"{name} at {m}": value for m in MATCHED for name, value in matched(course, m).items()}
    bench.write(rows)
    bench.write(courses, "courses.csv")
    for skill, m in product(SKILLS, MATCHED):
        mine = [r for r in rows if r["skill"] == skill and f"gap at {m}" in r]
        print(f"\n{skill}, where {m} of digits 2 to {LENGTH} are right behind right ones; differences paired by seed\n")
        told = {a: [spread(v) if (v := [r[f"{n} at {m}"] for r in mine if r["arm"] == a]) else "" for n in NAMES] for a in ARMS}
        lines = ([f"`{a}`", *told[a], "" if a == "seqkd" else paired(mine, a, "seqkd", f"gap at {m}")] for a in ARMS)
        print(table(["", *NAMES, "gap - `seqkd`'s"], lines))
    there = f"gap at {MATCHED[0]}"
    panels = {
        f"{skill}: {title}": {
            arm: {
                i: [r[f"{kind} {i} at {MATCHED[0]}"] for r in rows if (r["arm"], r["skill"]) == (arm, skill) and there in r]
                for i in range(2, LENGTH + 1)
            }
            for arm in ARMS
        }
        for skill, (kind, title) in product(SKILLS, (("own", "own answer"), ("wrong", "one wrong digit before")))
    }
    curves(bench.results / "positions.png", panels, "digit of the answer", f"right, at {MATCHED[0]} behind right digits")


def means(measured: Row) -> dict[str, float]:
    """The share of right digits by position and, over digits 2 to the last, on the whole."""
    by = {f"{kind} {i}": measured[f"position/{i}/{kind}"] for kind in KINDS for i in range(2, LENGTH + 1)}
    mean = {kind: sum(by[f"{kind} {i}"] for i in range(2, LENGTH + 1)) / (LENGTH - 1) for kind in KINDS}
    return by | mean | {"gap": mean["right"] - mean["own"], "last gap": by[f"right {LENGTH}"] - by[f"own {LENGTH}"]}


def matched(course: list[dict[str, float]], m: float) -> dict[str, float]:
    """All numbers where the share behind right digits passes m for the first time, between two measurements linearly."""
    for before, after in pairwise(course):
        if before["right"] < m <= after["right"]:
            share = (m - before["right"]) / (after["right"] - before["right"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return {}


if __name__ == "__main__":
    start(main, __file__)
