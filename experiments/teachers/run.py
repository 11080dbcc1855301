"""Self-distillation far past convergence: is a frozen teacher, a moving average or the live student the better one?

python -m experiments.teachers.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, Row, between, paired, picked, row, spread, start, table
from experiments.looks import DOUBLED, LOOKS, SEEDS, by_look
from opd_lightning.loggers import read_csv

TEACHERS = ("frozen", "ema", "ema_fast", "sync", "trust_region", "live")
MOVING = ("ema", "ema_fast", "sync", "live")
RATES = ("2e-4",)
LEARNED = ("new/accuracy", "prior/accuracy")
SKILLS = {skill: f"prior/{skill}/accuracy" for skill in ("copy", "reverse", "increment", "sort")}
SHOWN, ALONE = "teacher/shown/accuracy", "teacher/shown/student_accuracy"
NUMBERS = (*LEARNED, "prior/format", SHOWN)
AT = range(0, 401, 40)
PROTOCOL = ["method=sdft", "data.batch_size=32", "trainer.max_steps=400", "evaluation.every=40", "task.n_eval=128"]


def main(bench: Bench) -> None:
    cells = [
        ({"arm": t, "lr": rate, "seed": seed}, [*PROTOCOL, f"teacher={t}", f"name={t}", f"optim.lr={rate}", f"seed={seed}"])
        for t, rate, seed in product(TEACHERS, RATES, SEEDS)
    ]
    runs = bench.run("teachers", cells)
    bench.write([row(labels, run, NUMBERS) | last_logged(run) for labels, run in runs])
    bench.write([{**labels, **h} for labels, run in runs for h in run.evaluation["history"]], "history.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows, history = bench.read(), bench.read("history.csv")
    names = [*NUMBERS, "entropy"]
    print("\nAfter 400 updates, mean and interval over seeds\n")
    print(table(["teacher", *names], ([f"`{t}`", *(means(picked(rows, arm=t), n) for n in names)] for t in TEACHERS)))
    print("\nDifference to `frozen`, paired by seed\n")
    print(table(["teacher", *LEARNED], ([f"`{t}`", *(paired(rows, t, "frozen", n) for n in LEARNED)] for t in TEACHERS[1:])))
    print("\nDifference of `ema` to `sync`, paired by seed\n")
    print(table(LEARNED, [[paired(rows, "ema", "sync", n) for n in LEARNED]]))
    print("\nNew skill after 400 updates, seed by seed\n")
    print(
        table(["teacher", *SEEDS], ([f"`{t}`", *(f"{r['new/accuracy']:.3f}" for r in picked(rows, arm=t))] for t in TEACHERS))
    )
    looks(rows)
    along(history)
    single(history)
    panels = {
        title: {t: {at: [h[number] for h in picked(history, arm=t, step=at)] for at in AT} for t in TEACHERS}
        for title, number in zip(("new skill", "prior skills"), LEARNED, strict=True)
    }
    curves(bench.results / "teachers.png", panels, "updates", "accuracy (greedy, test prompts)")


def looks(rows: list[Row]) -> None:
    """`ema`, whose verdict the added seeds change."""
    print("\nDifference of `ema` to `frozen`, by seeds\n")
    print(table(["", *LOOKS, DOUBLED], ([n, *by_look(rows, "ema", "frozen", n)] for n in LEARNED)))


def along(history: list[Row]) -> None:
    """From the first look to the last one, and at the end the teacher beside its student on the same prompts."""
    first, last = {"step": AT[1]}, {"step": AT[-1]}
    print(f"\nAt update {AT[1]}, least and greatest of the seeds\n")
    seen = {t: picked(history, arm=t, **first) for t in TEACHERS}
    print(table(["teacher", *LEARNED], ([f"`{t}`", *(ends([r[n] for r in seen[t]]) for n in LEARNED)] for t in TEACHERS)))
    print(f"\nChange from update {AT[1]} to {AT[-1]}, paired by seed\n")
    changes = ([f"`{t}`", *(between(picked(history, arm=t), last, first, n) for n in LEARNED)] for t in TEACHERS)
    print(table(["teacher", *LEARNED], changes))
    print("\nDifference to `frozen` in prior/accuracy along training, paired by seed\n")
    moving = ([f"`{t}`", *(paired(picked(history, step=at), t, "frozen", LEARNED[1]) for at in AT[2:])] for t in MOVING)
    print(table(["update", *AT[2:]], moving))
    print(f"\nThe teacher, shown the demonstration, less its student, on the same prompts at update {AT[-1]}\n")
    apart = [r | {"apart": r[SHOWN] - r[ALONE]} for r in picked(history, **last) if SHOWN in r]
    print(table(["teacher", "difference"], ([f"`{t}`", means(picked(apart, arm=t), "apart")] for t in TEACHERS)))


def single(history: list[Row]) -> None:
    """The prior skills one by one, where their mean may hide what they do."""
    first, last, half = {"step": AT[1]}, {"step": AT[-1]}, {"step": AT[len(AT) // 2]}
    print("\nThe four prior skills, 32 prompts each; differences paired by seed\n")
    frozen, midway = picked(history, arm="frozen"), picked(history, **half)
    lines = (
        [f"`{skill}`", means(picked(frozen, **first), n), between(frozen, last, first, n), paired(midway, "sync", "frozen", n)]
        for skill, n in SKILLS.items()
    )
    titles = [f"`frozen` at {AT[1]}", f"its change until {AT[-1]}", f"`sync` - `frozen` at {half['step']}"]
    print(table(["", *titles], lines))


def means(rows: list[Row], number: str) -> str:
    """Mean and interval over these rows; nothing where none has the number."""
    values = [r[number] for r in rows if number in r]
    return spread(values) if values else ""


def ends(values: list[float]) -> str:
    """Least and greatest."""
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


def last_logged(run) -> dict[str, float | None]:
    """The student's entropy on its own completions at the end, nats per token."""
    seen = [r["train/student_entropy"] for r in read_csv(run.folder / "metrics.csv") if "train/student_entropy" in r]
    return {"entropy": seen[-1] if seen else None}


if __name__ == "__main__":
    start(main, __file__, tell)
