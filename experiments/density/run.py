"""Tokens that a student must write to learn a skill: RL against distillation, as answers get longer.

python -m experiments.density.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, Row, row, spread, start, table

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
PROTOCOL = ["optim.lr=2e-4", "evaluation=validation", "evaluation.every=5", "task.n_eval=128"]
PROTOCOL += ["budget.accuracy=0.95", "budget.in_a_row=1", "trainer.max_steps=150", "task.max_new_tokens=10"]


def main(bench: Bench) -> None:
    folder = bench.starts({"long": LONG})["long"]
    digits = {n: [f"task.length={n}", *bench.begin(folder)] for n in LENGTHS}
    cells = [
        (
            {"arm": arm, "length": n, "seed": seed},
            [*ARMS[arm], f"name={arm}", f"seed={seed}", *digits[n], *PROTOCOL],
        )
        for n, arm, seed in product(LENGTHS, ARMS, SEEDS)
    ]
    runs = bench.run("density", cells)
    # What RL has learned, distilled into a fresh student: the teacher is the GRPO run of the same seed.
    taught = {labels["seed"]: run.folder for labels, run in runs if (labels["arm"], labels["length"]) == ("grpo", LENGTHS[0])}
    again = [
        (
            {"arm": "full_from_rl", "length": LENGTHS[0], "seed": seed},
            ["method=opd", "name=full_from_rl", f"seed={seed}", *digits[LENGTHS[0]], f"teacher.path={teacher}", *PROTOCOL],
        )
        for seed, teacher in taught.items()
    ]
    runs += bench.run("density", again)
    rows = [row(labels, run, ("validation/new/accuracy", "validation/prior/accuracy")) for labels, run in runs]
    bench.write(rows)
    for number, unit in (("student_tokens", 1000), ("updates", 1)):
        unit_told = " (thousands)" if unit > 1 else ""
        print(f"\n{number}{unit_told} until the skill is at 0.95, mean and interval; runs that reached it\n")
        lines = (
            [f"`{arm}`", *(told([r for r in rows if (r["arm"], r["length"]) == (arm, n)], number, unit) for n in LENGTHS)]
            for arm in (*ARMS, "full_from_rl")
        )
        print(table(["", *(f"{n} digits" for n in LENGTHS)], lines))
    print("\nTokens of `arm` / tokens of `full`, of the runs that reached 0.95 (mean of the seeds' ratios)\n")
    print(table(["", *(f"{n} digits" for n in LENGTHS)], ([f"`{a}`", *(ratio(rows, a, n) for n in LENGTHS)] for a in ARMS)))
    panels = {f"{n} digits": {arm: learning(runs, arm, n) for arm in ARMS} for n in LENGTHS}
    curves(bench.results / "density.png", panels, "tokens written by the student", "accuracy (greedy, validation)", log=True)


def learning(runs, arm: str, length: int) -> dict[float, list[float]]:
    """Accuracy against tokens written so far, at the mean tokens per update of these runs."""
    mine = [run for labels, run in runs if (labels["arm"], labels["length"]) == (arm, length)]
    tokens = sum(run.ledger["tokens"].get("student_tokens", 0) for run in mine) / max(
        1, sum(run.ledger["steps"] for run in mine)
    )
    found: dict[float, list[float]] = {}
    for measured in (h for run in mine for h in run.evaluation["history"] if h["step"] > 0):
        found.setdefault(measured["step"] * tokens, []).append(measured["validation/new/accuracy"])
    return found


def told(some: list[Row], number: str, unit: int) -> str:
    """Mean and interval over the runs that reached the target."""
    reached = [r[number] / unit for r in some if r["reached"]]
    return f"{spread(reached, 0) if reached else 'never'} ({len(reached)}/{len(some)})" if some else ""


def ratio(rows: list[Row], arm: str, length: int) -> str:
    """How many times the tokens of the full vocabulary, paired by seed."""
    tokens = {
        (r["arm"], r["seed"]): r["student_tokens"]
        for r in rows
        if r["length"] == length and r["reached"] and r["student_tokens"]
    }
    found = [tokens[arm, s] / tokens["full", s] for s in SEEDS if (arm, s) in tokens and ("full", s) in tokens]
    return spread(found, 1) if found else ""


if __name__ == "__main__":
    start(main, __file__)
