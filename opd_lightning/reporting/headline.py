"""Which few numbers a report begins with: what was learned, what was kept, how robust, or whatever a study measured instead."""

from dataclasses import dataclass

from opd_lightning.evaluation import headlines
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels, metrics, spread


@dataclass(frozen=True)
class Headline:
    """A number that a report begins with.

    Attributes:
        name: in evaluation.json.
        label: for people.
        won: what is said of the best in it, before the method's name.
        least: is the least the best, as of a distance?
    """

    name: str
    label: str
    won: str
    least: bool = False


KNOWN = (
    Headline("new/accuracy", "new skill", "The new skill was learned best by"),
    Headline("prior/accuracy", "prior skills", "Prior skills were kept best by"),
    Headline("robust/mean", "robustness", "The highest robustness is that of"),
)
"""Taken where they were measured."""
KINDS = ("accuracy", "harness/", "score", "avg@", "pass@", "log_likelihood", "kl")
"""What is taken instead: every accuracy, then of each kind the first; without any of these, whatever is first."""
COSTS = {"updates": "updates", "flops": "FLOPs"}
MOST = 3


def numbers(run: Run) -> dict[str, float]:
    """Everything that a run measured at its end, and its costs."""
    return run.evaluation["end"] | metrics(run)


def chosen(runs: list[Run]) -> list[Headline]:
    """At most three numbers: those of KNOWN that some run has, and where these are not two, others of KINDS."""
    measured = dict.fromkeys(name for run in runs for name in run.evaluation["end"])
    found = [known for known in KNOWN if known.name in measured]
    if len(found) >= 2:
        return found
    names = headlines(measured) or [name for name in measured if name.startswith("validation/") and name.count("/") == 2]
    names = [n for n in names if "teacher" not in n and not n.startswith("robust/") and n not in {h.name for h in found}]
    for kind in KINDS:
        some = [n for n in names if kind in n and n not in {h.name for h in found}]
        found += [other(name) for name in (some if kind == "accuracy" else some[:1])]
    return (found or [other(name) for name in names[:1]])[:MOST]


def other(name: str) -> Headline:
    """A number that is none of KNOWN, by its own name; of distances (KL) the least is the best."""
    label = name.replace("/", " ").replace("_", " ")
    least = name.endswith("kl")
    return Headline(name, label, f"The {'lowest' if least else 'highest'} {label} is that of", least)


@dataclass(frozen=True)
class Line:
    """A method in a short table.

    Attributes:
        label: the method's.
        met: how many of its runs reached the study's target, such as "2 of 3".
        cells: mean and range of each headline number, then of updates and FLOPs; empty where not measured.
    """

    label: str
    met: str
    cells: list[tuple[str, str]]


def lines(runs: list[Run]) -> list[Line]:
    """The short table: the start model, where it was evaluated, then each method."""
    names = [*(h.name for h in chosen(runs)), *COSTS]
    start = runs[0].evaluation["start"]
    found = [Line("start model", "", [spread([start[n]] if n in start else [], n) for n in names])] if start else []
    for label, cell in labels(runs).items():
        values = [numbers(run) for run in cell]
        met = f"{sum(not run.censored for run in cell)} of {len(cell)}"
        found.append(Line(label, met, [spread([v[n] for v in values if n in v], n) for n in names]))
    return found


def one_seed(runs: list[Run]) -> bool:
    """Has every method a single run?"""
    return all(len(cell) == 1 for cell in labels(runs).values())


def seeds_told(runs: list[Run]) -> str:
    """How many seeds a method has: "3", or "2 to 3"."""
    n = {len(cell) for cell in labels(runs).values()}
    return f"{min(n)}" if len(n) == 1 else f"{min(n)} to {max(n)}"


def more_seeds(runs: list[Run]) -> str:
    """An override that adds two seeds to those that are there."""
    there = sorted({run.seed for run in runs})
    return "seed=" + ",".join(str(seed) for seed in (*there, there[-1] + 1, there[-1] + 2))
