"""Every method against one of them, number by number: paired over seeds, and a verdict only where the interval supports it."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from opd_lightning.report.runs import Run
from opd_lightning.report.statistics import LEVEL, Difference, holm, over_prompts, over_seeds
from opd_lightning.report.table import by_cell, labels, metrics

COMPARED = ("new/accuracy", "prior/accuracy", "prior/format", "robust/worst", "robust/mean", "flops")
"""What is compared where it was measured; everything else is in results.csv for whoever asks."""


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline on one number.

    Attributes:
        metric, method, baseline: names.
        difference: method - baseline.
        adjusted: Holm's p-value among the methods compared on this number.
    """

    metric: str
    method: str
    baseline: str
    difference: Difference
    adjusted: float

    @property
    def verdict(self) -> str:
        """ "higher", "lower" or "undecided"."""
        d = self.difference
        if self.adjusted >= 1 - LEVEL or d.low <= 0 <= d.high:
            return "undecided"
        return "higher" if d.mean > 0 else "lower"

    @property
    def sentence(self) -> str:
        """What may be said."""
        d, digits = self.difference, ".2e" if self.metric == "flops" else ".3f"
        numbers = f"{d.mean:+{digits}} [{d.low:+{digits}}, {d.high:+{digits}}]"
        basis = f"95 % over {d.seeds} seeds" if d.over == "seeds" and d.seeds > 1 else f"95 % over {d.over}"
        if d.seeds == 1 and d.over == "seeds":
            numbers, basis = f"{d.mean:+{digits}}", "one seed"
        if d.alike:
            basis = f"the same with all {d.seeds} seeds, so that no spread supports a verdict"
        better = {"higher": "costs more", "lower": "costs less"} if self.metric == "flops" else {}
        said = "undecided" if self.verdict == "undecided" else f"{self.method} {better.get(self.verdict, f'is {self.verdict}')}"
        return f"{self.metric}, {self.method} against {self.baseline}: {said}, {numbers} ({basis})."


def compare(runs: list[Run], against: str | None = None) -> tuple[list[Comparison], list[str]]:
    """Comparisons with the cell called `against`, by default the study's baseline, else the first; and who was not compared.

    Cells are compared that reached the study's target with every seed, had the baseline's budget and share a seed with it.

    Raises:
        ValueError: there is no such cell.
    """
    cells = labels(runs)
    wanted = against or runs[0].config["study"].get("baseline")
    if against is not None and against not in cells:
        raise ValueError(f"--against {against} is no method of this study; there are {', '.join(cells)}.")
    base = wanted if wanted in cells else next(iter(cells))
    notes = [] if base == wanted else [f"all are compared with {base}, the first by name; --against chooses another"]
    reasons = {label: reason for label, cell in cells.items() if (reason := unmatched(cell, cells[base]))}
    if base in reasons:
        return [], [*notes, f"nothing is compared with {base}: {reasons[base]}; --against chooses another"]
    notes += [f"{label} is not compared: {reason}" for label, reason in reasons.items()]
    found = []
    for metric in COMPARED:
        family = [
            (label, difference(cell, cells[base], metric))
            for label, cell in cells.items()
            if label != base and label not in reasons and all(metric in metrics(run) for run in [*cell, *cells[base]])
        ]
        adjusted = holm([d.p for _, d in family])
        found += [Comparison(metric, name, base, d, p) for (name, d), p in zip(family, adjusted, strict=True)]
    return found, notes


def unmatched(cell: list[Run], base: list[Run]) -> str | None:
    """Why a cell cannot be compared with another, or None."""
    censored = sum(run.censored for run in cell)
    if censored:
        return f"{censored} of {len(cell)} runs did not reach the target"
    if any(run.config["budget"] != base[0].config["budget"] for run in cell):
        return "it had another budget"
    limits = [base[0].config["budget"][name] for name in ("student_tokens", "flops", "seconds", "accuracy")]
    steps = {run.ledger["steps"] for run in [*cell, *base]}
    if limits == [None] * 4 and len(steps) > 1:
        return f"updates are the budget, and they differ ({', '.join(map(str, sorted(steps)))})"
    return None if paired(cell, base) else "no seed is in both"


def paired(cell: list[Run], base: list[Run]) -> bool:
    """Is there a seed in both?"""
    return bool({run.seed for run in cell} & {run.seed for run in base})


def difference(cell: list[Run], base: list[Run], metric: str) -> Difference:
    """Over seeds; for a single one over prompts, where single prompts were kept."""
    over = over_seeds({r.seed: metrics(r)[metric] for r in cell}, {r.seed: metrics(r)[metric] for r in base})
    if over.seeds > 1:
        return over
    shared = {r.seed for r in cell} & {r.seed for r in base}
    ours, theirs = (next(scores(r, metric) for r in some if r.seed in shared) for some in (cell, base))
    asked = sorted(set(ours) & set(theirs))
    return over_prompts([ours[i] for i in asked], [theirs[i] for i in asked]) if asked else over


def scores(run: Run, metric: str) -> dict[str, float]:
    """What each prompt of a run's accuracy scored; nothing where that was not kept."""
    group, number = metric.rsplit("/", 1) if "/" in metric else ("", metric)
    path = run.folder / "outcomes.json"
    if number != "accuracy" or not path.is_file():
        return {}
    told = json.loads(path.read_text()).get("accuracy", {})
    return {i: float(told["content"] >= 1) for i, told in told.items() if told["skill"].split("/")[0] == group}


def write_comparisons(comparisons: list[Comparison], path: Path) -> None:
    """comparisons.csv, one row per comparison."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["metric", "method", "baseline", "difference", "low", "high", "seeds", "over", "p", "p_holm", "verdict"]
        )
        for c in comparisons:
            d = c.difference
            numbers = [f"{x:.6g}" for x in (d.mean, d.low, d.high)]
            writer.writerow(
                [c.metric, c.method, c.baseline, *numbers, d.seeds, d.over, f"{d.p:.4g}", f"{c.adjusted:.4g}", c.verdict]
            )


def choose_rates(runs: list[Run]) -> dict[str, tuple[float, str]]:
    """The learning rate of each method, and why: of those that reach the target with every seed, the one that keeps most.

    "Keeps" is `validation/prior/accuracy` after the last update, averaged over seeds; where no rate reaches the target, the
    best `validation/new/accuracy` decides. Of equals (to 0.01)
    the larger rate is taken, which needs fewer updates. Test prompts are never looked at.
    """
    chosen: dict[str, tuple[float, str]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        cells = [cell for cell in by_cell(runs).values() if cell[0].name == name]
        reached = [cell for cell in cells if not any(run.censored for run in cell)]
        key = "validation/prior/accuracy" if reached else "validation/new/accuracy"

        def mean(cell: list[Run], key: str = key) -> float:
            return sum(run.evaluation["end"][key] for run in cell) / len(cell)

        best = max(reached or cells, key=lambda cell: (round(mean(cell), 2), cell[0].config["optim"]["lr"]))
        rates = {float(cell[0].config["optim"]["lr"]): f"{mean(cell):.3f}" for cell in reached or cells}
        grid = [float(cell[0].config["optim"]["lr"]) for cell in cells]
        edge = (
            "; the edge of the grid" if len(grid) > 1 and float(best[0].config["optim"]["lr"]) in (min(grid), max(grid)) else ""
        )
        missed = f"; {len(cells) - len(reached)} rates missed the target" if len(reached) < len(cells) else ""
        told = ", ".join(f"{rate:g}: {value}" for rate, value in sorted(rates.items()))
        chosen[name] = float(best[0].config["optim"]["lr"]), f"{key} by rate {told}{missed}{edge}"
    return chosen
