"""Six methods at a matched accuracy: who keeps most of the prior skills, who is most robust, and at what cost?

python -m experiments.demo.run

The runs and figures are those of study=demo and its report; `tell` makes the tables, and draws nothing. Of the figures those
that the text shows are kept.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from experiments.grid import SMALL, Bench, Row, between, picked, start, table
from experiments.looks import ADDED, FIRST, SEEDS
from experiments.robustness.run import PERTURBED as ONE_AT_A_TIME
from opd_lightning.report.compare import Comparison
from opd_lightning.report.runs import load_study
from opd_lightning.report.statistics import holm, over_seeds
from opd_lightning.study import report

BASELINE = "sft"
QUALITY = {
    "new/accuracy": "new skill",
    "prior/accuracy": "prior skills",
    "prior/format": "native style on prior skills",
    "robust/mean": "robustness, mean",
    "robust/worst": "robustness, worst case",
}
CHOSEN = QUALITY | {"flops": "FLOPs"}
COSTS = {"updates": "updates", "student_tokens": "student tokens", "flops": "FLOPs", "teacher_training": "FLOPs of the teacher"}
SKILLS = {f"prior/{skill}/accuracy": f"`{skill}`" for skill in ("copy", "reverse", "increment", "sort")}
DISTANCES = {
    "start/new/forward_kl": "KL(start \\|\\| model), new prompts",
    "start/new/reverse_kl": "KL(model \\|\\| start), new prompts",
    "start/prior/forward_kl": "KL(start \\|\\| model), prior prompts",
    "start/prior/reverse_kl": "KL(model \\|\\| start), prior prompts",
}
PERTURBED = {"robust/none": "none"} | ONE_AT_A_TIME
FIGURES = ("forgetting.png", "robustness.png", "divergence.png")


def main(bench: Bench) -> None:
    folder = sweep(bench, "demo")
    report(folder)
    bench.results.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "comparisons.csv", *FIGURES):
        shutil.copy(folder / name, bench.results)
    runs = load_study(folder)[0]
    bench.write([{"method": run.name, "seed": run.seed} | h for run in runs for h in run.evaluation["history"]], "courses.csv")
    seconds = sum(sum(run.ledger["seconds"].values()) for run in runs)
    print(f"\nall runs together, by their ledgers: {seconds / 60:.1f} minutes, evaluation included")
    tell(bench)


def sweep(bench: Bench, study: str) -> Path:
    """Make what is missing of a study's runs by its own command; their folder. A shrunken study is one of its own."""
    name = f"{study}_small" if bench.small else study
    line = [sys.executable, "-m", "opd_lightning", "-m", f"study={study}", f"study.name={name}", f"output_dir={bench.out}"]
    if bench.small:
        line += [*SMALL, "seed=0", "optim.lr=1e-3", "logger=none"]
    if bench.jobs > 1:
        line += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={bench.jobs}"]
    subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return bench.out / name


def tell(bench: Bench) -> None:
    rows, courses = bench.read(), bench.read("courses.csv")
    methods = list(dict.fromkeys(r["method"] for r in rows))
    compared = [m for m in methods if m != BASELINE and all(reached(r) for r in picked(rows, method=m))]
    rows = [r | {n: picked(courses, method=r["method"], seed=r["seed"])[-1][n] for n in SKILLS} for r in rows]
    for title, names in {
        "Each method at the end": QUALITY | COSTS,
        "The four prior skills at the end": SKILLS,
        "Accuracy on the new skill under each perturbation": PERTURBED,
        "Distance to the start model at the end, nats per token": DISTANCES,
    }.items():
        print(f"\n{title}: means over seeds, with [lowest, highest] where they differ\n")
        print(table(["method", *names.values()], ([f"`{m}`", *ends(picked(rows, method=m), names)] for m in methods)))
    print("\nPrior prompts answered rightly and in the native style, at least and at most by the shares of each\n")
    print(table(["method", "both"], ([f"`{m}`", both(picked(rows, method=m))] for m in methods)))
    differences(rows, compared, bench.read("comparisons.csv"))
    looks(rows, compared)
    finishes(last_two(courses, rows), compared)
    print(f"\n{len(rows)} runs, {sum(r['seconds'] for r in rows) / 60:.1f} minutes without evaluation")


def differences(rows: Sequence[Row], compared: Sequence[str], comparisons: Sequence[Row]) -> None:
    """Each method less the baseline: what was chosen before the runs with verdicts, and everything else without."""
    columns = [f"`{m}`" for m in compared]
    print(f"\nDifference to `{BASELINE}`, paired by seed; verdicts after Holm's adjustment among methods\n")
    told = {(c["metric"], c["method"]): verdict(c) for c in comparisons}
    print(table(["", *columns], ([said, *(told.get((n, m), "") for m in compared)] for n, said in CHOSEN.items())))
    for names in (SKILLS, PERTURBED, DISTANCES):
        print(f"\nDifference to `{BASELINE}`, paired by seed, without verdicts\n")
        print(table(["", *columns], ([said, *(difference(rows, m, n) for m in compared)] for n, said in names.items())))
    print("\nShare of the foreign tokens in the difference of the robustness's mean\n")
    print(table(columns, [[f"{share(rows, m):.2f}" for m in compared]]))
    neighbours(rows)


def looks(rows: Sequence[Row], compared: Sequence[str]) -> None:
    """Comparisons whose verdict the added seeds changed: only what these show by themselves is free of the first look."""
    kinds = {"seeds 0 to 2, at first": FIRST, "3 and 4, added": ADDED, "all five": SEEDS}
    first, added, five = ([r for r in rows if r["seed"] in seeds] for seeds in kinds.values())
    print(f"\nDifference to `{BASELINE}` where seeds 3 and 4 changed the verdict; p is Holm's of five, doubled for two looks\n")
    lines = []
    for before, after in zip(compare(first, compared), compare(five, compared), strict=True):
        if before.verdict != after.verdict:
            then, alone, now = (difference(some, after.method, after.metric) for some in (first, added, five))
            told = [f"{then}, {before.verdict}", alone, f"{now}, {after.verdict}", f"{min(1.0, 2 * after.adjusted):.3f}"]
            lines.append([CHOSEN[after.metric], f"`{after.method}`", *told])
    print(table(["", "method", *kinds, "p"], lines))


def compare(rows: Sequence[Row], compared: Sequence[str]) -> Iterator[Comparison]:
    """What comparisons.csv would have by these runs alone."""
    for number in CHOSEN:
        values = {m: {r["seed"]: r[number] for r in picked(rows, method=m)} for m in (BASELINE, *compared)}
        told = [over_seeds(values[m], values[BASELINE]) for m in compared]
        for method, d, p in zip(compared, told, holm([d.p for d in told]), strict=True):
            yield Comparison(number, method, BASELINE, d, p)


def neighbours(rows: Sequence[Row]) -> None:
    """The methods that keep more than the baseline: are they told apart, and are their distances?"""
    print("\nDifferences between others than the baseline, paired by seed, without verdicts\n")
    names = {"prior/accuracy": "prior skills"} | DISTANCES
    lines = (
        [f"`{a}` - `{b}`", *(between(rows, {"method": a}, {"method": b}, n) for n in names)]
        for a, b in (("opd", "opd_sampled"), ("grpo", "opd_sampled"), ("opd", "grpo"))
    )
    print(table(["", *names.values()], lines))


def reached(run: Row) -> bool:
    """Did it end because it was at the target?"""
    return run["ended_by"] == "budget.accuracy"


def ends(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    """Mean [lowest, highest] of each number."""
    told = []
    for name in names:
        values = [r[name] for r in rows if name in r]
        greatest = max(values, default=0)
        form = ".3f" if 0 < greatest < 10 else ",.0f" if greatest < 1e7 else ".2e"
        middle, low, high = (f"{f(values):{form}}" if values else "" for f in (mean, min, max))
        told.append(middle if low == high else f"{middle} [{low}, {high}]")
    return told


def both(rows: Sequence[Row], right: str = "prior/accuracy", native: str = "prior/format") -> str:
    """Share of answers that are right and native, which was not kept: what the shares of each allow, means over runs."""
    least = f"{mean(max(0, r[right] + r[native] - 1) for r in rows):.3f}"
    most = f"{mean(min(r[right], r[native]) for r in rows):.3f}"
    return least if least == most else f"{least} to {most}"


def difference(rows: Sequence[Row], method: str, number: str) -> str:
    """A method less the baseline."""
    return between(rows, {"method": method}, {"method": BASELINE}, number)


def verdict(c: Row) -> str:
    """A line of comparisons.csv; equal differences of all seeds have no spread, and so support no verdict."""
    form = "+.2e" if c["metric"] == "flops" else "+.3f"
    interval = "(all equal)" if c["low"] == c["high"] else f"[{c['low']:{form}}, {c['high']:{form}}]"
    return f"{c['difference']:{form}} {interval}, {c['verdict']}"


def share(rows: Sequence[Row], method: str) -> float:
    """How much of the difference in robust/mean is from foreign tokens in the answer, two of its eight perturbations."""
    eight = [n for n in PERTURBED if n != "robust/none"]
    less = {
        n: mean(r[n] for r in picked(rows, method=method)) - mean(r[n] for r in picked(rows, method=BASELINE)) for n in eight
    }
    return sum(less[n] for n in eight if "corrupted" in n) / sum(less.values())


def last_two(courses: Sequence[Row], runs: Iterable[Row]) -> list[Row]:
    """The two evaluations in a row that ended a run, of each run that reached the target."""
    rows = []
    for run in filter(reached, runs):
        *_, first, second = picked(courses, method=run["method"], seed=run["seed"])
        rows += [first | {"at": "first"}, second | {"at": "second"}]
    return rows


def finishes(rows: Sequence[Row], compared: Sequence[str]) -> None:
    """Where runs were at the target first, and what the updates until they ended changed."""
    print("\nAt the first of the two evaluations at the target, and what the second one adds; test prompts\n")
    first, number, lines = picked(rows, at="first"), "prior/accuracy", []
    for method in [m for m in (BASELINE, *compared) if picked(first, method=m)]:
        told = ends(picked(first, method=method), ("step", "new/accuracy", number))
        less = difference(first, method, number) if method != BASELINE else ""
        lines.append(
            [f"`{method}`", *told, less, between(picked(rows, method=method), {"at": "second"}, {"at": "first"}, number)]
        )
    print(
        table(["method", "update", "new skill", "prior skills", f"less `{BASELINE}`", "prior skills, second less first"], lines)
    )


if __name__ == "__main__":
    start(main, __file__, tell)
