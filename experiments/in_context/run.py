"""The dial: how often must a model go by a demonstration before self-distillation is as good as SFT?

python -m experiments.in_context.run
"""

from itertools import product
from math import sqrt
from statistics import mean

from experiments.courses import courses
from experiments.figures import curves
from experiments.grid import Bench, Row, Run, between, paired, picked, row, spread, start, table
from experiments.less_forgetting.run import STARTS
from experiments.likely import right_answers, right_greedy
from opd_lightning.evaluation.estimate import Estimate, proportion
from opd_lightning.tasks.world import WorldTask

BASES = {name: STARTS[name] for name in ("tolerant-0", "fragile-0k")}
MORE = ("--steps", "200", "--teacher-steps", "0")
OBEY = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
ARMS, RATES, SEEDS = ("sft", "sdft"), ("2e-4",), (0, 1, 2)
UPDATES, MATCHED, PROMPTS = 60, 0.9, 128
PROTOCOL = ["evaluation.every=20", f"trainer.max_steps={UPDATES}", f"task.n_eval={PROMPTS}"]
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format")
SKILLS = ("new", "prior", "both")


def main(bench: Bench) -> None:
    bases = bench.starts(BASES, last="start")
    options = {
        f"{base}-obey-{p}": [*BASES[base], "--base", f"{bases[base]}/start", "--obey", str(p), *MORE]
        for base, p in product(BASES, OBEY)
    }
    starts = bench.starts(options, last="start")
    task = WorldTask(n_eval=PROMPTS)
    dial = {
        name: {"shown": round(right_answers(folder / "start", task, shown=True), 4)}
        | {"greedy": right_greedy(folder / "start", task, shown=True)}
        for name, folder in starts.items()
    }
    cells = [
        (
            {"arm": arm, "start": base, "obey": p, "lr": rate, "seed": seed},
            [
                f"method={arm}",
                f"name={arm}",
                f"model.path={starts[f'{base}-obey-{p}']}/start",
                f"optim.lr={rate}",
                f"seed={seed}",
                *PROTOCOL,
            ],
        )
        for rate, base, p, arm, seed in product(RATES, BASES, OBEY, ARMS, SEEDS)
    ]
    runs = bench.run("in_context", cells)
    bench.write(courses(runs, NUMBERS), "courses.csv")
    rows = []
    for labels, run in runs:
        told = row(labels | dial[f"{labels['start']}-obey-{labels['obey']}"], run, NUMBERS)
        rows.append(told | new_prior_and_mean(run.evaluation["history"][-1], "end"))
        rows[-1] |= new_prior_and_mean(first_at_matched(run), "matched")
    bench.write(rows)
    tell(bench)


def tell(bench: Bench) -> None:
    rows, measured = bench.read() + bench.earlier(), bench.read("courses.csv") + bench.earlier("earlier_courses.csv")
    bases = list(dict.fromkeys(r["start"] for r in rows))
    header = ["obeys", "P(right), shown", "greedy, shown", *(f"`{arm}` {n}" for arm in ARMS for n in SKILLS[:2])]
    titles = {"end": f"after {UPDATES} updates", "matched": f"first at {MATCHED}, or after {UPDATES} updates"}
    for base, (when, title) in product(bases, titles.items()):
        print(f"\n{base}, {title}; the last columns are `sdft` - `sft`\n")
        some = (picked(rows, start=base, obey=p) for p in OBEY)
        print(table([*header, "new", "prior", "mean of both"], (setting(mine, when) for mine in some if mine)))
    *_, before, last = sorted({r["update"] for r in measured})
    header = ["obeys", "greedy, shown", f"`sdft` new after {before}", f"after {last}", "student - shown", f"{last} - {before}"]
    header += [f"`sft` new after {before}", *(f"`{arm}` prior, {last} - {before}" for arm in ARMS), "prior at the start"]
    for base in bases:
        print(f"\n{base}, shown (Wilson's interval over prompts), and its students between updates {before} and {last};")
        print("student - shown: a rough interval over prompts, which are others for the student than for the start model\n")
        some = ((picked(rows, start=base, obey=p), picked(measured, start=base, obey=p)) for p in OBEY)
        print(table(header, (last_two(mine[0], course, before, last) for mine, course in some if mine)))
    share = "share of demonstrations that decided"
    curves(bench.results / "taught.png", {base: taught(rows, base) for base in bases}, share, "accuracy")
    panels = {f"{base}, {title}": differences(rows, base, when) for base, (when, title) in product(bases, titles.items())}
    curves(bench.results / "in_context.png", panels, share, "sdft - sft", zero=True, columns=2)


def taught(rows: list[Row], base: str) -> dict[str, dict[float, list[float]]]:
    """The students' new skill after the last update, beside the start model's own when it is shown the demonstration."""
    mine = [r for r in rows if r["start"] == base]
    found = {arm: {p: [r["new end"] for r in mine if (r["arm"], r["obey"]) == (arm, p)] for p in OBEY} for arm in ARMS}
    shown = {p: [r for r in mine if r["obey"] == p][:1] for p in OBEY}
    for title, number in (("start model, shown: greedy", "greedy"), ("start model, shown: P(right)", "shown")):
        found[title] = {p: [r[number] for r in some] for p, some in shown.items()}
    return found


def new_prior_and_mean(measured: Row, when: str) -> Row:
    """The new skill, the prior ones and their mean at one evaluation."""
    new, prior = measured["new/accuracy"], measured["prior/accuracy"]
    return {f"update {when}": measured["step"]} | {
        f"{name} {when}": value for name, value in zip(SKILLS, (new, prior, (new + prior) / 2), strict=True)
    }


def first_at_matched(run: Run) -> Row:
    """The first evaluation with the new skill at MATCHED, else the last one."""
    history = run.evaluation["history"]
    return next((h for h in history if h["new/accuracy"] >= MATCHED), history[-1])


def setting(mine: list[Row], when: str) -> list[str]:
    """A line of the table: one setting of the dial."""
    arms = [spread([r[f"{n} {when}"] for r in mine if r["arm"] == arm]) for arm in ARMS for n in SKILLS[:2]]
    compared = (paired(mine, "sdft", "sft", f"{n} {when}") for n in SKILLS)
    return [str(mine[0]["obey"]), f"{mine[0]['shown']:.3f}", f"{mine[0]['greedy']:.3f}", *arms, *compared]


def last_two(start_model: Row, measured: list[Row], before: int, last: int) -> list[str]:
    """A line of the table of the last two evaluations: one setting of the dial."""
    new, prior = NUMBERS[:2]
    reached = {(arm, u): [r[new] for r in picked(measured, arm=arm, update=u)] for arm in ARMS for u in (before, last)}
    moved = {
        (arm, number): between(measured, {"arm": arm, "update": last}, {"arm": arm, "update": before}, number)
        for arm, number in product(ARMS, (new, prior))
    }
    shown, student = share_of_prompts(start_model["greedy"]), share_of_prompts(mean(reached["sdft", last]))
    told = [start_model["obey"], shown, *(spread(reached["sdft", u]) for u in (before, last))]
    told += [newcombe(student, shown), moved["sdft", new], spread(reached["sft", before])]
    told += [*(moved[arm, prior] for arm in ARMS), spread([r[prior] for r in picked(measured, update=0)])]
    return [*map(str, told)]


def share_of_prompts(value: float) -> Estimate:
    """A share of PROMPTS prompts, with Wilson's interval."""
    return proportion([value] * PROMPTS)


def newcombe(first: Estimate, second: Estimate) -> str:
    """Two shares of different prompts: their difference with Newcombe's interval (1998), made of Wilson's two.

    Rough for a student: the mean of seeds that were asked the same prompts is taken for one of them.
    """
    value = first.value - second.value
    low = value - sqrt((first.value - first.low) ** 2 + (second.high - second.value) ** 2)
    high = value + sqrt((first.high - first.value) ** 2 + (second.value - second.low) ** 2)
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def differences(rows: list[Row], base: str, when: str) -> dict[str, dict[float, list[float]]]:
    """`sdft` - `sft` at each setting of the dial, a value per seed."""
    found: dict[str, dict[float, list[float]]] = {}
    mine = [r for r in rows if r["start"] == base]
    for title, name in zip(("new skill", "prior skills", "mean of both"), SKILLS, strict=True):
        value = {(r["arm"], r["obey"], r["seed"]): r[f"{name} {when}"] for r in mine}
        for (arm, p, seed), reached in value.items():
            if arm == "sdft" and ("sft", p, seed) in value:
                found.setdefault(title, {}).setdefault(p, []).append(reached - value["sft", p, seed])
    return found


if __name__ == "__main__":
    start(main, __file__, tell)
