"""Self-distillation far past convergence: is a frozen teacher, a moving average or the live student the better one?

python -m experiments.teachers.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, paired, row, spread, start, table
from opd_lightning.loggers import read_csv

TEACHERS = ("frozen", "ema", "ema_fast", "sync", "trust_region", "live")
RATES, SEEDS = ("2e-4",), (0, 1, 2)
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format", "teacher/shown/accuracy")
PROTOCOL = ["method=sdft", "data.batch_size=32", "trainer.max_steps=400", "evaluation.every=40", "task.n_eval=128"]


def main(bench: Bench) -> None:
    cells = [
        ({"arm": t, "lr": rate, "seed": seed}, [*PROTOCOL, f"teacher={t}", f"name={t}", f"optim.lr={rate}", f"seed={seed}"])
        for t, rate, seed in product(TEACHERS, RATES, SEEDS)
    ]
    runs = bench.run("teachers", cells)
    rows = [row(labels, run, NUMBERS) | last_logged(run) for labels, run in runs]
    bench.write(rows)
    bench.write([{**labels, **h} for labels, run in runs for h in run.evaluation["history"]], "history.csv")
    names = [*NUMBERS, "entropy"]
    present = [n for n in names if all(r.get(n) is not None for r in rows if r["arm"] == "frozen")]
    told = []
    for teacher in dict.fromkeys(r["arm"] for r in rows):
        mine = [r for r in rows if r["arm"] == teacher]
        told.append(
            [f"`{teacher}`", *(spread([r[n] for r in mine]) if all(r[n] is not None for r in mine) else "" for n in present)]
        )
    print(table(["teacher", *present], told))
    print("\nDifference to `frozen`, paired by seed\n")
    others = [a for a in dict.fromkeys(r["arm"] for r in rows) if a != "frozen"]
    print(table(["teacher", *present[:2]], ([f"`{a}`", *(paired(rows, a, "frozen", n) for n in present[:2])] for a in others)))
    panels = {
        title: {
            t: {
                step: [
                    h[number]
                    for c, run in runs
                    for h in run.evaluation["history"]
                    if (c["arm"], h["step"]) == (t, step) and number in h
                ]
                for step in range(0, 401, 40)
            }
            for t in TEACHERS
        }
        for title, number in (("new skill", "new/accuracy"), ("prior skills", "prior/accuracy"))
    }
    curves(bench.results / "teachers.png", panels, "updates", "accuracy (greedy, test prompts)")


def last_logged(run) -> dict[str, float | None]:
    """The student's entropy on its own completions at the end, nats per token."""
    seen = [r["train/student_entropy"] for r in read_csv(run.folder / "metrics.csv") if "train/student_entropy" in r]
    return {"entropy": seen[-1] if seen else None}


if __name__ == "__main__":
    start(main, __file__)
