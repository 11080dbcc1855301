"""Comparisons of every method with a baseline, number by number, paired over seeds, with a verdict where supported."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from opd_lightning.reporting.headline import COSTS, chosen, numbers
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.statistics import LEVEL, Difference, holm, over_prompts, over_seeds
from opd_lightning.reporting.table import by_cell, labels

COMPARED = ("new/accuracy", "prior/accuracy", "prior/format", "robust/worst", "robust/mean", "flops")
"""Numbers that are compared if measured, beside the headline numbers; results.csv has all."""
NONE_SHOWN, ONE_SEED = "no difference shown", "one seed"


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
        """One of "higher", "lower", NONE_SHOWN and ONE_SEED."""
        d = self.difference
        if d.seeds == 1:
            return ONE_SEED
        if self.adjusted >= 1 - LEVEL or d.low <= 0 <= d.high:
            return NONE_SHOWN
        return "higher" if d.mean > 0 else "lower"

    @property
    def shown(self) -> bool:
        """Whether the difference is significant."""
        return self.verdict in ("higher", "lower")


@dataclass(frozen=True)
class Compared:
    """All methods against one of them.

    Attributes:
        baseline: its name.
        comparisons: number by number.
        reasons: of each method that was not compared; of the baseline, if nothing was.
        notes: how the baseline was chosen, where the study sets none.
    """

    baseline: str
    comparisons: list[Comparison]
    reasons: dict[str, str]
    notes: list[str]

    @property
    def sentences(self) -> list[str]:
        """The notes, and the reasons of methods that were not compared."""
        if self.baseline in self.reasons:
            reason = self.reasons[self.baseline]
            return [*self.notes, f"nothing is compared with {self.baseline}: {reason}; --against chooses another"]
        return [*self.notes, *(f"{label} is not compared: {reason}" for label, reason in self.reasons.items())]

    def of(self, method: str, metric: str) -> Comparison | None:
        """A method's comparison on a number, if there is one."""
        return next((c for c in self.comparisons if (c.method, c.metric) == (method, metric)), None)


def compare(runs: list[Run], against: str | None = None) -> Compared:
    """Comparisons with the cell called `against` (or in the folder of that name), by default the study's baseline, else the
    first by name.

    Cells are compared that reached the study's target with every seed, had the baseline's budget and share a seed with it.

    Raises:
        ValueError: there is no such cell.
    """
    cells = labels(runs)
    wanted = against or runs[0].config["study"].get("baseline")
    wanted = next((label for label, cell in cells.items() if wanted == cell[0].cell), wanted)
    if against is not None and wanted not in cells:
        raise ValueError(f"--against {against} is no method of this study; there are {'; '.join(cells)}.")
    base = wanted if wanted in cells else next(iter(cells))
    by_default = base != wanted and len(cells) > 1
    notes = [f"all are compared with {base}, the first by name; --against chooses another"] if by_default else []
    reasons = {label: reason for label, cell in cells.items() if (reason := unmatched(cell, cells[base]))}
    if base in reasons:
        return Compared(base, [], {base: reasons[base]}, notes)
    comparisons = []
    for metric in dict.fromkeys([*COMPARED, *(headline.name for headline in chosen(runs))]):
        family = [
            (label, difference(cell, cells[base], metric))
            for label, cell in cells.items()
            if label != base and label not in reasons and all(metric in numbers(run) for run in [*cell, *cells[base]])
        ]
        adjusted = holm([d.p for _, d in family])
        comparisons += [Comparison(metric, name, base, d, p) for (name, d), p in zip(family, adjusted, strict=True)]
    return Compared(base, comparisons, reasons, notes)


def unmatched(cell: list[Run], base: list[Run]) -> str | None:
    """The reason why a cell cannot be compared with another, or None."""
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


def difference_text(runs: list[Run], compared: Compared, label: str, name: str) -> str:
    """A method's difference from the baseline as text for a table cell; costs as percentages."""
    comparison = compared.of(label, name)
    if comparison is None:
        return ""
    if not comparison.shown:
        return ONE_SEED if comparison.verdict == ONE_SEED else "none shown"
    size = f"{percent(comparison, runs):+.0f} %" if name in COSTS else f"{comparison.difference.mean:+.3f}"
    return f"{size} {comparison.verdict}"


def percent(comparison: Comparison, runs: list[Run]) -> float:
    """A difference as a percentage of the baseline's mean over the seeds that both have."""
    cells = labels(runs)
    shared = {run.seed for run in cells[comparison.method]}
    base = mean(numbers(run)[comparison.metric] for run in cells[comparison.baseline] if run.seed in shared)
    return 100 * comparison.difference.mean / base if base else 0.0


def paired(cell: list[Run], base: list[Run]) -> bool:
    """Whether two cells have a seed in common."""
    return bool({run.seed for run in cell} & {run.seed for run in base})


def difference(cell: list[Run], base: list[Run], metric: str) -> Difference:
    """The difference over seeds; with a single seed over prompts, where their scores were kept."""
    over = over_seeds({r.seed: numbers(r)[metric] for r in cell}, {r.seed: numbers(r)[metric] for r in base})
    if over.seeds > 1:
        return over
    shared = {r.seed for r in cell} & {r.seed for r in base}
    first, second = (next(scores(r, metric) for r in runs if r.seed in shared) for runs in (cell, base))
    prompts = sorted(set(first) & set(second))
    return over_prompts([first[i] for i in prompts], [second[i] for i in prompts]) if prompts else over


def scores(run: Run, metric: str) -> dict[str, float]:
    """The score of each prompt by example id; empty where scores were not kept."""
    group, number = metric.rsplit("/", 1) if "/" in metric else ("", metric)
    path = run.folder / "outcomes.json"
    if number != "accuracy" or not path.is_file():
        return {}
    read = json.loads(path.read_text())
    outcomes = read.get("accuracy") or read.get("episodes") or {}
    return {i: float(outcome["content"] >= 1) for i, outcome in outcomes.items() if outcome["skill"].split("/")[0] == group}


def write_comparisons(comparisons: list[Comparison], path: Path) -> None:
    """Write comparisons.csv, one row per comparison; interval and p-values are empty with a single seed."""
    header = ["metric", "method", "baseline", "difference", "low", "high", "seeds", "over", "p", "p_holm", "verdict"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for c in comparisons:
            d = c.difference
            low, high, p, adjusted = f"{d.low:.6g}", f"{d.high:.6g}", f"{d.p:.4g}", f"{c.adjusted:.4g}"
            cells = [low, high, d.seeds, d.over, p, adjusted] if d.seeds > 1 else ["", "", 1, "one seed", "", ""]
            writer.writerow([c.metric, c.method, c.baseline, f"{d.mean:.6g}", *cells, c.verdict])


def choose_rates(runs: list[Run]) -> dict[str, tuple[float, str]]:
    """The learning rate of each method, with the reason, from the validation split.

    Among rates that reach the target with every seed: the highest `validation/prior/accuracy` after the last update, averaged
    over seeds. If no rate reaches it: the highest `validation/new/accuracy`. Of equals (to 0.01) the larger rate is taken.
    """
    chosen: dict[str, tuple[float, str]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        cells = [cell for cell in by_cell(runs).values() if cell[0].name == name]
        reached = [cell for cell in cells if not any(run.censored for run in cell)]
        key = "validation/prior/accuracy" if reached else "validation/new/accuracy"

        def average(cell: list[Run], key: str = key) -> float:
            return mean(run.evaluation["end"][key] for run in cell)

        best = max(reached or cells, key=lambda cell: (round(average(cell), 2), cell[0].config["optim"]["lr"]))
        rates = {float(cell[0].config["optim"]["lr"]): f"{average(cell):.3f}" for cell in reached or cells}
        grid = [float(cell[0].config["optim"]["lr"]) for cell in cells]
        edge = (
            "; the edge of the grid" if len(grid) > 1 and float(best[0].config["optim"]["lr"]) in (min(grid), max(grid)) else ""
        )
        missed = f"; {len(cells) - len(reached)} rates missed the target" if len(reached) < len(cells) else ""
        by_rate = ", ".join(f"{rate:g}: {value}" for rate, value in sorted(rates.items()))
        chosen[name] = float(best[0].config["optim"]["lr"]), f"{key} by rate {by_rate}{missed}{edge}"
    return chosen
