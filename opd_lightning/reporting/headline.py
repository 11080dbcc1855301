"""Headline numbers: the few numbers that a report begins with."""

from dataclasses import dataclass

from opd_lightning.evaluation import KINDS
from opd_lightning.evaluation import headlines as evaluation_headlines
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels, metrics, spread


@dataclass(frozen=True)
class Headline:
    """A number that a report begins with.

    Attributes:
        name: in evaluation.json.
        label: as shown in reports.
        won: start of the sentence about the best method; its name follows.
        least: whether lower is better, as for a KL.
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
"""Headline numbers that are shown if measured."""
COSTS = {"updates": "updates", "flops": "FLOPs"}
MOST = 3


def numbers(run: Run) -> dict[str, float]:
    """All numbers of a run after its last update, and its costs."""
    return run.evaluation["end"] | metrics(run)


def chosen(runs: list[Run]) -> list[Headline]:
    """At most three headline numbers: those of KNOWN that any run has.

    If there are fewer than two, also every accuracy, then the first of each of KINDS, or the first number.
    """
    measured = dict.fromkeys(name for run in runs for name in run.evaluation["end"])
    headlines = [known for known in KNOWN if known.name in measured]
    if len(headlines) >= 2:
        return headlines
    names = evaluation_headlines(measured) or [
        name for name in measured if name.startswith("validation/") and name.count("/") == 2
    ]
    names = [n for n in names if "teacher" not in n and not n.startswith("robust/") and n not in {h.name for h in headlines}]
    for kind in KINDS:
        matching = [n for n in names if kind in n and n not in {h.name for h in headlines}]
        headlines += [other(name) for name in (matching if kind == "accuracy" else matching[:1])]
    return (headlines or [other(name) for name in names[:1]])[:MOST]


def other(name: str) -> Headline:
    """A headline number that is none of KNOWN, labelled by its name; of KLs and NLLs the lowest is the best."""
    label = name.replace("/", " ").replace("_", " ")
    least = name.endswith(("kl", "nll"))
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
    rows = [Line("start model", "", [spread([start[n]] if n in start else [], n) for n in names])] if start else []
    for label, cell in labels(runs).items():
        values = [numbers(run) for run in cell]
        met = f"{sum(not run.censored for run in cell)} of {len(cell)}"
        rows.append(Line(label, met, [spread([v[n] for v in values if n in v], n) for n in names]))
    return rows


def one_seed(runs: list[Run]) -> bool:
    """Whether every method has a single run."""
    return all(len(cell) == 1 for cell in labels(runs).values())


def seed_counts(runs: list[Run]) -> str:
    """The number of seeds per method as text: "3", or "2 to 3"."""
    n = {len(cell) for cell in labels(runs).values()}
    return f"{min(n)}" if len(n) == 1 else f"{min(n)} to {max(n)}"


def more_seeds(runs: list[Run]) -> str:
    """An override that adds two seeds to the present ones."""
    there = sorted({run.seed for run in runs})
    return "seed=" + ",".join(str(seed) for seed in (*there, there[-1] + 1, there[-1] + 2))
