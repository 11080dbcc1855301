"""Tokens that a student must write to learn a skill: RL against distillation, as answers get longer.

python -m experiments.density.run
"""

from itertools import combinations, product
from math import exp, log
from statistics import mean

from scipy import stats

from experiments.courses import courses
from experiments.figures import curves
from experiments.grid import Bench, Row, paired, picked, row, spread, start, table
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
LENGTHS, SEEDS, FIRST_SEEDS = (4, 6, 8), (0, 1, 2, 3, 4), (0, 1, 2)
OTHERS = ("second", "first")
"""Start models that this command made on other kinds of processor: only their numbers are kept, of FIRST_SEEDS."""
FEWER = "kept, only seeds " + ", ".join(map(str, FIRST_SEEDS))  # what as few seeds would have told
BATCHES = {64: (1, 150), 8: (4, 1200)}  # prompts per update: updates between evaluations, and at most
PROTOCOL = ["optim.lr=2e-4", "evaluation=validation", "task.n_eval=128"]
PROTOCOL += ["budget.accuracy=0.95", "budget.in_a_row=1", "task.max_new_tokens=10"]
NEW, PRIOR = "validation/new/accuracy", "validation/prior/accuracy"
COUNTED = {"student_tokens": ("thousands of tokens", 1000, 1), "updates": ("updates", 1, 1), PRIOR: ("prior skills", 1, 3)}
"""Numbers of a run: what they are called, their unit, and decimals."""
COSTS = {"Tokens": "student_tokens", "FLOPs": "flops"}
HEADER = ["", *(f"{n} digits" for n in LENGTHS)]
SOONER = BATCHES[8][0] - 1  # updates that a run of 8 prompts may have been at 0.95 before it was asked

Logs = dict[int, float]
"""Logarithms of tokens or FLOPs, or of their ratios, by seed."""


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
    bench.write([row(labels, run, (NEW, PRIOR)) | {"chance": chance.get(labels["length"])} for labels, run in runs])
    bench.write(courses(runs, (NEW,)), "courses.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read()
    others = {name: bench.earlier(f"{name}.csv") for name in OTHERS}
    models = {"kept": rows} | {name: some for name, some in others.items() if some}
    fewer = {FEWER: [r for r in rows if r["seed"] in FIRST_SEEDS]}
    for name, some in (models | fewer).items():
        print(f"\n# Start model: {name}")
        say(some)
    from_rl(models | fewer)
    start_models(models)
    course = bench.read("courses.csv")
    panels = {
        f"{n} digits, {batch} prompts per update": {
            arm: learning(rows, course, arm=arm, length=n, prompts=batch) for arm in (*ARMS, "full_from_rl")
        }
        for batch, n in product(BATCHES, LENGTHS)
    }
    axes = ("tokens written by the student", "accuracy (greedy, validation)")
    curves(bench.results / "density.png", panels, *axes, log=True, each=True, columns=len(LENGTHS))


def say(rows: list[Row]) -> None:
    """All numbers of the runs that began with one start model."""
    chance = {r["length"]: r["chance"] for r in rows if "chance" in r}
    print("\nProbability of a right answer before training:", *(f"{p:.2g} ({n} digits)" for n, p in chance.items()))
    print(f"{len(picked(rows, reached=True))} of {len(rows)} runs reached 0.95")
    for batch in BATCHES:
        tables(picked(rows, prompts=batch), f"{batch} prompts")
    rl_or_distillation(rows)


def tables(rows: list[Row], batch: str) -> None:
    """Tokens, updates and prior skills by arm and length, and how they compare to those of the full vocabulary."""
    arms = [a for a in (*ARMS, "full_from_rl") if picked(rows, arm=a)]
    for number, (title, unit, digits) in COUNTED.items():
        print(f"\n{batch} per update: {title} when the skill is at 0.95, and runs that reached it\n")
        cells = {a: [mean_of_those_there(picked(rows, arm=a, length=n), number, unit, digits) for n in LENGTHS] for a in arms}
        print(table(HEADER, ([f"`{a}`, {batch}", *cells[a]] for a in arms)))
    print(f"\n{batch} per update: tokens of `arm` / tokens of `full`, paired by seed, of the runs that reached 0.95\n")
    ratios = {a: [multiple(times(rows, {"arm": a}, {"arm": "full"}, length=n)) for n in LENGTHS] for a in arms if a != "full"}
    print(table(HEADER, ([f"`{a}`, {batch}", *some] for a, some in ratios.items())))
    sizes = [picked(rows, length=n, reached=True) for n in LENGTHS]
    pairs = [*((a, "full") for a in arms if a != "full"), ("sampled_baseline", "sampled")]
    for number in ("updates", PRIOR):
        print(f"\n{batch} per update: difference in {number}, paired by seed\n")
        print(table(HEADER, ([f"`{a}` - `{b}`, {batch}", *(paired(some, a, b, number) for some in sizes)] for a, b in pairs)))


def rl_or_distillation(rows: list[Row]) -> None:
    """How many times the tokens and the FLOPs of distillation RL takes, and how that grows with the answer."""
    settings = {  # prompts per update of RL and of distillation; updates that RL was there before it was asked
        "64 prompts per update": (64, 64, 0),
        "8 prompts per update": (8, 8, 0),
        "64 completions per update": (8, 64, 0),
        f"64 completions per update, `grpo` {SOONER} updates sooner": (8, 64, SOONER),
    }
    for title, number in COSTS.items():
        print(f"\n{title} of `grpo` / those of `full`, paired by seed, and how many times that is at the longest answers\n")
        lines = []
        for setting, (mine, other, sooner) in settings.items():
            pair = {"arm": "grpo", "prompts": mine}, {"arm": "full", "prompts": other}
            by = [times(rows, *pair, sooner, number, length=n) for n in LENGTHS]
            lines.append([setting, *map(multiple, by), multiple(apart(by[-1], by[0]))])
        print(table([*HEADER, f"{LENGTHS[-1]} digits / {LENGTHS[0]} digits"], lines))
    print("\nUpdates of `grpo` against those of `full`, seed by seed, and their difference\n")
    cells = {batch: [race(picked(rows, prompts=batch, length=n)) for n in LENGTHS] for batch in BATCHES}
    print(table(HEADER, ([f"{batch} prompts", *some] for batch, some in cells.items())))


def start_models(models: dict[str, list[Row]]) -> None:
    """Does what GRPO keeps beyond `full` differ between start models? Their runs are no pairs: Welch's interval."""
    print("\nDifference of `grpo` to `full` in prior skills, one start model's less another's, with Welch's interval\n")
    lines = []
    for batch, (first, second) in product(BATCHES, combinations(models, 2)):
        cells = [unpaired(*(kept(models[name], batch, n) for name in (first, second))) for n in LENGTHS]
        lines.append([f"{batch} prompts, {first} - {second}", *cells])
    print(table(HEADER, lines))


def from_rl(models: dict[str, list[Row]]) -> None:
    """What RL with 64 prompts has learned, in a fresh student: against RL, with as many prompts and as many completions."""
    again, some = {"arm": "full_from_rl", "prompts": 64}, [picked(rows, length=LENGTHS[0]) for rows in models.values()]
    print(f"\n`full_from_rl` and `grpo`, {LENGTHS[0]} digits, paired by seed, by start model\n")
    wide = [picked(rows, prompts=64) for rows in some]
    lines = [
        [f"{number}: `full_from_rl` - `{arm}`", *(paired(rows, "full_from_rl", arm, number) for rows in wide)]
        for number, arm in (("updates", "grpo"), (PRIOR, "grpo"), (PRIOR, "full"))
    ]
    for (cost, number), (prompts, sooner) in product(COSTS.items(), ((64, 0), (8, 0), (8, SOONER))):
        title = f"{cost} of `grpo`, {prompts} prompts, {sooner} updates sooner / those of `full_from_rl`"
        cells = (multiple(times(rows, {"arm": "grpo", "prompts": prompts}, again, sooner, number)) for rows in some)
        lines.append([title, *cells])
    print(table(["", *models], lines))


def learning(rows: list[Row], course: list[Row], **labels) -> dict[float, list[float]]:
    """Accuracy against tokens written so far, at the mean tokens per update of these runs."""
    mine = picked(rows, **labels)
    tokens = sum(r["student_tokens"] for r in mine) / max(1, sum(r["updates"] for r in mine))
    runs = [{c["update"]: c[NEW] for c in picked(course, seed=r["seed"], **labels)} for r in mine]
    updates = sorted({update for run in runs for update in run if update > 0})
    # A run that has ended stays where it ended.
    return {at * tokens: [run[max(u for u in run if u <= at)] for run in runs] for at in updates}


def race(some: list[Row]) -> str:
    """Updates of each run of GRPO and of `full`, in the order of their seeds, and the mean difference."""
    updates = [", ".join(str(r["updates"]) for r in picked(some, arm=arm)) for arm in ("grpo", "full")]
    return f"{' against '.join(updates)}: {paired(some, 'grpo', 'full', 'updates')}"


def mean_of_those_there(some: list[Row], number: str, unit: int, digits: int) -> str:
    """Mean and interval over the runs that reached the target."""
    reached = [r[number] / unit for r in picked(some, reached=True)]
    return f"{spread(reached, digits) if reached else 'never'} ({len(reached)}/{len(some)})" if some else ""


def kept(rows: list[Row], batch: int, length: int) -> list[float]:
    """By how much more of the prior skills GRPO ends with than `full`, a number per seed."""
    mine, other = ({r["seed"]: r[PRIOR] for r in picked(rows, arm=a, prompts=batch, length=length)} for a in ("grpo", "full"))
    return [mine[seed] - other[seed] for seed in mine if seed in other]


def unpaired(first: list[float], second: list[float]) -> str:
    """The difference of two means, with Welch's interval."""
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    return f"{mean(first) - mean(second):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def times(rows: list[Row], first: Row, second: Row, sooner: int = 0, number: str = COSTS["Tokens"], **labels) -> Logs:
    """A cost of the first / that of the second, of runs that reached 0.95; the first taken so many updates sooner."""
    mine, other = (picked(rows, reached=True, **some, **labels) for some in (first, second))
    costs = {r["seed"]: log(r[number] * (1 - sooner / r["updates"])) for r in mine}
    return apart(costs, {r["seed"]: log(r[number]) for r in other})


def apart(first: Logs, second: Logs) -> Logs:
    """The logarithm of first / second, seed by seed."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def multiple(logs: Logs) -> str:
    """The geometric mean of ratios, with Student's t interval of their logarithms."""
    if len(logs) < 2:
        return ""
    ratio = over_seeds(logs, dict.fromkeys(logs, 0.0))
    return f"{exp(ratio.mean):.2f} " + ("(all equal)" if ratio.alike else f"[{exp(ratio.low):.2f}, {exp(ratio.high):.2f}]")


if __name__ == "__main__":
    start(main, __file__, tell)
