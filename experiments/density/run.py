"""Tokens that a student must write to learn a skill: RL against distillation, as answers get longer.

python -m experiments.density.run
"""

from itertools import product
from math import exp, log

from experiments.figures import curves
from experiments.grid import Bench, Row, paired, row, spread, start, table
from experiments.likely import right_answers
from opd_lightning.report.statistics import over_seeds
from opd_lightning.tasks.world import WorldTask

LONG = [
    "--steps",
    "3000",
    "--fragile",
    "--tolerant-teacher",
    "--demonstrations",
    "0",
    "--lengths",
    "4",
    "6",
    "8",
    "--guess",
    "0.3",
]
ARMS = {
    "grpo": ["method=grpo"],  # eight completions per prompt, a verifier, no teacher
    "sampled": ["method=opd_sampled"],
    "sampled_baseline": ["method=opd_sampled", "loss/support=sampled_baseline"],
    "top4": ["method=opd_topk", "loss.support.k=4"],
    "full": ["method=opd"],
}
LENGTHS, SEEDS = (4, 6, 8), (0, 1, 2)
BATCHES = {64: (1, 150), 8: (4, 1200)}  # prompts per update: updates between evaluations, and at most
PROTOCOL = ["optim.lr=2e-4", "evaluation=validation", "task.n_eval=128"]
PROTOCOL += ["budget.accuracy=0.95", "budget.in_a_row=1", "task.max_new_tokens=10"]


def main(bench: Bench) -> None:
    folder = bench.starts({"long": LONG})["long"]
    digits = {n: [f"task.length={n}", *bench.begin(folder), *PROTOCOL] for n in LENGTHS}
    size = {n: [f"data.batch_size={n}", f"evaluation.every={e}", f"trainer.max_steps={m}"] for n, (e, m) in BATCHES.items()}
    cells = [
        (
            {"arm": arm, "prompts": batch, "length": n, "seed": seed},
            [*ARMS[arm], f"name={arm}", f"seed={seed}", *digits[n], *size[batch]],
        )
        for batch, n, arm, seed in product(BATCHES, LENGTHS, ARMS, SEEDS)
    ]
    runs = bench.run("density", cells)
    # What RL has learned, distilled into a fresh student: the teacher is the GRPO run of the same seed.
    n, batch = LENGTHS[0], 64
    taught = {c["seed"]: run.folder for c, run in runs if (c["arm"], c["length"], c["prompts"]) == ("grpo", n, batch)}
    again = [
        (
            {"arm": "full_from_rl", "prompts": batch, "length": n, "seed": seed},
            ["method=opd", "name=full_from_rl", f"seed={seed}", *digits[n], *size[batch], f"teacher.path={teacher}"],
        )
        for seed, teacher in taught.items()
    ]
    runs += bench.run("density", again)
    chance = {} if bench.small else {n: right_answers(folder / "start", WorldTask(n_eval=128, length=n)) for n in LENGTHS}
    print("\nProbability of a right answer before training:", {n: f"{p:.1e}" for n, p in chance.items()})
    rows = [row(labels, run, ("validation/new/accuracy", "validation/prior/accuracy")) for labels, run in runs]
    rows = [r | {"chance": chance.get(r["length"])} for r in rows]
    bench.write(rows)
    alike = [r for r in rows if (r["arm"], r["prompts"]) in (("grpo", 8), ("full", 64))]
    print("\n64 completions per update for both: tokens of `grpo` (8 prompts) / tokens of `full` (64 prompts)\n")
    print(table([f"{n} digits" for n in LENGTHS], [[ratio(alike, "grpo", n) for n in LENGTHS]]))
    for batch in BATCHES:
        tables([r for r in rows if r["prompts"] == batch], batch)
    panels = {
        f"{n} digits, {batch} prompts per update": {arm: learning(runs, arm, n, batch) for arm in (*ARMS, "full_from_rl")}
        for batch, n in product(BATCHES, LENGTHS)
    }
    axes = ("tokens written by the student", "accuracy (greedy, validation)")
    curves(bench.results / "density.png", panels, *axes, log=True, each=True, columns=len(LENGTHS))


def tables(rows: list[Row], batch: int) -> None:
    """Updates, tokens, and how many times the tokens of the full vocabulary."""
    arms = [a for a in (*ARMS, "full_from_rl") if any(r["arm"] == a for r in rows)]
    header = ["", *(f"{n} digits" for n in LENGTHS)]
    for number, unit, title in (("student_tokens", 1000, "thousands of tokens"), ("updates", 1, "updates")):
        print(f"\n{batch} prompts per update: {title} until the skill is at 0.95, and runs that reached it\n")
        cells = {a: [told([r for r in rows if (r["arm"], r["length"]) == (a, n)], number, unit) for n in LENGTHS] for a in arms}
        print(table(header, ([f"`{a}`", *cells[a]] for a in arms)))
    print(f"\n{batch} prompts per update: tokens of `arm` / tokens of `full`, paired by seed, of the runs that reached 0.95\n")
    print(table(header, ([f"`{a}`", *(ratio(rows, a, n) for n in LENGTHS)] for a in arms if a != "full")))
    for number in ("updates", "validation/prior/accuracy"):
        print(f"\n{batch} prompts per update: difference to `full` in {number}, paired by seed\n")
        sizes = {n: [r for r in rows if r["length"] == n and r["reached"]] for n in LENGTHS}
        print(table(header, ([f"`{a}`", *(paired(sizes[n], a, "full", number) for n in LENGTHS)] for a in arms if a != "full")))


def learning(runs, arm: str, length: int, batch: int) -> dict[float, list[float]]:
    """Accuracy against tokens written so far, at the mean tokens per update of these runs."""
    mine = [run for c, run in runs if (c["arm"], c["length"], c["prompts"]) == (arm, length, batch)]
    tokens = sum(run.ledger["tokens"].get("student_tokens", 0) for run in mine) / max(1, sum(r.ledger["steps"] for r in mine))
    found: dict[float, list[float]] = {}
    courses = [{h["step"]: h["validation/new/accuracy"] for h in run.evaluation["history"]} for run in mine]
    for step in sorted({step for course in courses for step in course if step > 0}):
        # A run that has ended stays where it ended.
        found[step * tokens] = [course[max(s for s in course if s <= step)] for course in courses]
    return found


def told(some: list[Row], number: str, unit: int) -> str:
    """Mean and interval over the runs that reached the target."""
    reached = [r[number] / unit for r in some if r["reached"]]
    return f"{spread(reached, 1) if reached else 'never'} ({len(reached)}/{len(some)})" if some else ""


def ratio(rows: list[Row], arm: str, length: int) -> str:
    """How many times the tokens of the full vocabulary, paired by seed: geometric mean, with Student's t on logs."""
    tokens = {(r["arm"], r["seed"]): r["student_tokens"] for r in rows if r["length"] == length and r["reached"]}
    found = {s: log(tokens[arm, s] / tokens["full", s]) for s in SEEDS if (arm, s) in tokens and tokens.get(("full", s))}
    if len(found) < 2:
        return ""
    told = over_seeds(found, dict.fromkeys(found, 0.0))
    return f"{exp(told.mean):.2f} [{exp(told.low):.2f}, {exp(told.high):.2f}]"


if __name__ == "__main__":
    start(main, __file__)
