"""Results: the evaluations of one training as dicts, and as a table and a figure that notebooks show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from rich.table import Table

from opd_lightning.evaluation import Estimate, headlines

if TYPE_CHECKING:
    from opd_lightning.reporting.inline import Picture

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """The evaluations of a training.

    Attributes:
        name: the method's.
        history: the numbers of each evaluation by name, with its "step".
        intervals: 95 % intervals over prompts ("low" and "high") by name, at "start" and "end".
        costs: the costs at each evaluation, such as "flops" and "student_tokens".
        answers: "prompts", and the answers to them at "start" and "end".
    """

    name: str
    history: Sequence[Numbers]
    intervals: Mapping[str, Mapping[str, Numbers]] = field(default_factory=dict)
    costs: Sequence[Numbers] = ()
    answers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def start(self) -> dict[str, float]:
        """The numbers before training."""
        return dict(self.history[0])

    @property
    def end(self) -> dict[str, float]:
        """The numbers after it."""
        return dict(self.history[-1])

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, start and end with its interval, of each headline number."""
        bounds, rows = self.intervals.get("end", {}), []
        for name in headlines(self.end):
            before = "" if name not in self.start else f"{self.start[name]:.3f}"
            estimate = Estimate(self.end[name], low=bounds.get(name, {}).get("low"), high=bounds.get(name, {}).get("high"))
            rows.append((name, before, str(estimate)))
        return rows

    def __rich__(self) -> Table:
        return table(self.name, self.rows())

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in HEADER)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<table><caption>{escape(self.name)}</caption><tr>{head}</tr>{body}</table>"

    def figure(self, *names: str) -> "Picture":
        """Numbers against updates, a panel each; by default the first four headlines.

        Raises:
            ValueError: there is no number of a name.
        """
        from opd_lightning.reporting.inline import Picture  # matplotlib takes a while to import

        shown = headlines(self.end)
        if unknown := [name for name in names if name not in self.end]:
            raise ValueError(f"{unknown[0]} is no number of this evaluation; it has {', '.join(shown)}.")
        names = names or tuple(shown[:4])
        picture = Picture(figsize=(3.2 * len(names), 2.6), layout="constrained")
        for i, name in enumerate(names, start=1):
            axes = picture.add_subplot(1, len(names), i)
            rows = [row for row in self.history if name in row]
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker="o", markersize=3)
            axes.set(title=name, xlabel="updates")
            axes.grid(alpha=0.25)
        return picture


HEADER = ("evaluation", "start", "end [95 % over prompts]")


def table(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    """Evaluations before and after training, for the terminal."""
    made = Table(*HEADER, title=title, title_justify="left")
    for row in rows:
        made.add_row(*row)
    return made
