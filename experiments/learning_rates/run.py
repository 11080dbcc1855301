"""At a matched accuracy, how much of the prior skills is left, by method and rate? The runs are those of study=demo_lr.

python -m experiments.learning_rates.run
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean

from experiments.demo.run import both, sweep
from experiments.figures import curves
from experiments.grid import Bench, Row, between, paired, picked, spread, start, table
from opd_lightning.report.compare import choose_rates
from opd_lightning.report.runs import Run, load_study

BASELINE = "sft"


def main(bench: Bench) -> None:
    runs, left_out = load_study(sweep(bench, "demo_lr"))
    for sentence in left_out:
        print(f"note: {sentence}")
    bench.write([line(run) for run in sorted(runs, key=lambda r: (r.name, r.config["optim"]["lr"], r.seed))])
    tell(bench)


def line(run: Run) -> Row:
    """A line of results.csv; nothing of it is of test prompts."""
    end = run.evaluation["end"]
    told = {"arm": run.name, "lr": float(run.config["optim"]["lr"]), "seed": run.seed, "censored": run.censored}
    told |= {"new": end["validation/new/accuracy"], "prior": end["validation/prior/accuracy"]}
    told |= {"prior_format": end["validation/prior/format"], "updates": run.ledger["steps"]}
    return told | {"flops": sum(run.ledger["flops"].values()), "student_tokens": run.ledger["tokens"]["student_tokens"]}


def tell(bench: Bench) -> None:
    rows = bench.read()
    arms, rates = list(dict.fromkeys(r["arm"] for r in rows)), sorted({r["lr"] for r in rows}, key=float)
    cells = {(a, rate): picked(rows, arm=a, lr=rate) for a, rate in product(arms, rates)}
    reached = {at: cell for at, cell in cells.items() if not any(r["censored"] for r in cell)}
    for number, title in {
        "prior": "Prior skills where the new one is reached, and in brackets the updates that it took",
        "prior_format": "Native style on the prior skills there",
        "new": "The new skill at the end",
    }.items():
        print(f"\n{title}; validation prompts, mean and interval over seeds\n")
        shown = {at: spread([r[number] for r in cell]) for at, cell in (cells if number == "new" else reached).items()}
        if number == "prior":
            shown = {at: f"{told} ({mean(r['updates'] for r in reached[at]):.0f})" for at, told in shown.items()}
        print(table(["method", *rates], ([f"`{a}`", *(shown.get((a, rate), "never") for rate in rates)] for a in arms)))
    print("\nPrior prompts answered rightly and in the native style, at least and at most by the shares of each; means\n")
    shown = {at: both(cell, "prior", "prior_format") for at, cell in reached.items()}
    lines = ([f"`{a}`", *(shown.get((a, rate), "never") for rate in rates)] for a in arms)
    print(table(["method", *rates], lines))
    differences(rows, rates, reached)
    chosen(rows, arms)
    curve = {a: {float(rate): [r["prior"] for r in reached.get((a, rate), ())] for rate in rates} for a in arms}
    y = "accuracy on prior skills when the\nnew one reaches 0.95 (validation)"
    curves(bench.results / "rates.png", {"": curve}, "learning rate", y, log=True)


def differences(rows: list[Row], rates: list[str], reached: Mapping[tuple[str, str], list[Row]]) -> None:
    """Methods compared at each rate where both reach the target, and each method at the least and the greatest rate."""
    others = [a for a in dict.fromkeys(a for a, _ in reached) if a != BASELINE]
    compared = {"prior": [*((a, BASELINE) for a in others), ("grpo", "opd_sampled")], "new": [("sdft", BASELINE)]}
    for number, pairs in compared.items():
        print(f"\nDifferences in {number}, where both reach it, paired by seed\n")
        all_reached = [r for cell in reached.values() for r in cell]
        lines = ([f"`{a}` - `{b}`", *(paired(picked(all_reached, lr=rate), a, b, number) for rate in rates)] for a, b in pairs)
        print(table(["", *rates], lines))
    print(f"\nPrior skills at {rates[0]} less those at {rates[-1]}, paired by seed\n")
    ends = ({"lr": rates[0]}, {"lr": rates[-1]})
    lines = ([f"`{a}`", between(picked(rows, arm=a), *ends, "prior")] for a in (*others, BASELINE))
    print(table(["method", "difference"], lines))


def chosen(rows: list[Row], arms: list[str]) -> None:
    """The rate for study=demo, by the rule of `python -m opd_lightning.study outputs/demo_lr --rates`."""
    print("\nThe rate for study=demo, by the first two seeds and by three\n")
    seeds = sorted({r["seed"] for r in rows})
    some = {f"{n} seeds": choose_rates([as_run(r) for r in rows if r["seed"] in seeds[:n]]) for n in (2, 3)}
    print(table(["method", *some], ([f"`{a}`", *(f"{found[a][0]:g}" for found in some.values())] for a in arms)))


def as_run(r: Row) -> Run:
    """A line of results.csv as a run, with no more than that rule looks at."""
    config = {"name": r["arm"], "seed": r["seed"], "optim": {"lr": float(r["lr"])}, "budget": {"accuracy": 0.95}}
    status = {"ended_by": "trainer.max_steps" if r["censored"] else "budget.accuracy"}
    end = {"validation/prior/accuracy": r["prior"], "validation/new/accuracy": r["new"]}
    return Run(Path(f"{r['arm']}-{r['lr']}") / f"seed-{r['seed']}", config, status, {"end": end}, {})


if __name__ == "__main__":
    start(main, __file__, tell)
