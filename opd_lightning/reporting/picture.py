"""Picture: the first figure of a report, new against prior skills, with costs as the sizes of marks."""

from math import inf
from pathlib import Path
from statistics import mean
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opd_lightning.reporting.figures import COLOURS, MARKERS, NARROW
from opd_lightning.reporting.headline import chosen, numbers, one_seed, seed_counts
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels

AXES = {
    "new/accuracy": "learned: accuracy on the new skill",
    "prior/accuracy": "kept: accuracy on prior skills",
    "flops": "cost: FLOPs",
}
SMALLEST, LARGEST = 40, 350
"""Areas of marks in square points: the smallest, and that of the most expensive method."""
SPAN = 0.05
"""The shortest range of an axis of accuracies, so that small differences look small."""
FEW = 8
"""Up to this many methods are labelled with their costs."""


def picture(runs: list[Run], path: Path) -> str | None:
    """Draw the picture from the first two headline numbers, or from cost and the only one.

    Returns:
        the caption; None where there is nothing to draw.
    """
    names = [headline.name for headline in chosen(runs)]
    x, y = ("flops", names[0]) if len(names) == 1 else names[:2] if names else ("", "")
    cells = {label: cell for label, cell in labels(runs).items() if all({x, y} <= set(numbers(run)) for run in cell)}
    if not y or not cells:
        return None
    figure, axes = plt.subplots(figsize=(4.1, max(3.4, 0.2 * len(cells))))
    spent = {label: mean(numbers(run)["flops"] for run in cell) for label, cell in cells.items()}
    points = {}
    for i, (label, cell) in enumerate(cells.items()):
        xs, ys = ([numbers(run)[name] for run in cell] for name in (x, y))
        area = max(SMALLEST, LARGEST * spent[label] / (max(spent.values()) or 1))
        points[label] = mark(axes, xs, ys, area, i)
    frame(axes, x, y)
    name_marks(axes, points, spent)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)
    basis = "" if one_seed(runs) else f" Means of {seed_counts(runs)} seeds, lines from the lowest to the highest."
    better = "" if any(h.least for h in chosen(runs)[:2]) or x == "flops" else " Further up and to the right is better."
    return f"One mark per method; the larger, the more FLOPs it cost.{better}{basis}"


def mark(axes: Axes, xs: list[float], ys: list[float], area: float, i: int) -> tuple[float, float]:
    """Draw a method's mark at its means, with lines along its range; returns its position."""
    x, y, colour = mean(xs), mean(ys), COLOURS[i % 8]
    axes.plot([min(xs), max(xs)], [y, y], color=colour, linewidth=1.2)
    axes.plot([x, x], [min(ys), max(ys)], color=colour, linewidth=1.2)
    axes.scatter([x], [y], s=area, color=colour, marker=MARKERS[i % 8], alpha=0.75, edgecolors="white", zorder=3)
    return x, y


def frame(axes: Axes, x: str, y: str) -> None:
    """Set limits, ticks and labels of the axes."""
    for axis, (low, high), limit, name in (
        (axes.xaxis, axes.dataLim.intervalx, axes.set_xlim, x),
        (axes.yaxis, axes.dataLim.intervaly, axes.set_ylim, y),
    ):
        share = name.endswith("accuracy") or name.startswith("robust/")
        least = SPAN if share else 0.05 * max(abs(low), abs(high)) or 1.0
        room = max(0.15 * (high - low), (least - (high - low)) / 2)
        limit(low - room, high + room)
        axis.set_ticks(ticks(low - room, high + room, 1.0 if share else inf))
        axis.set_label_text(AXES.get(name, name.replace("/", " ").replace("_", " ")), fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.25)


def ticks(low: float, high: float, most: float) -> list[float]:
    """A few round numbers from low to high, none above `most`."""
    return [tick for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= min(high, most)]


def name_marks(axes: Axes, points: dict[str, tuple[float, float]], spent: dict[str, float]) -> None:
    """Write names (and costs, if few) beside the axes, each with a line to its mark."""
    few = len(points) <= FEW
    size = 11.0 if few else 8.0
    order = sorted(points, key=lambda label: points[label][1])
    (low, high), colours = axes.get_ylim(), dict(zip(points, range(len(points)), strict=True))
    height = axes.get_window_extent().height / axes.figure.dpi
    wanted = [(points[label][1] - low) / (high - low) for label in order]
    rows = max(fill(label, NARROW).count("\n") for label in order) if few else 0
    for label, place in zip(order, apart(wanted, ((2.5 if few else 1.2) + rows) * size / 72 / height), strict=True):
        axes.annotate(
            f"{fill(label, NARROW)}\n{spent[label]:.1e} FLOPs" if few else label,
            points[label],
            (1.08, place),
            textcoords="axes fraction",
            parse_math=False,
            va="center",
            fontsize=size,
            arrowprops={"arrowstyle": "-", "color": COLOURS[colours[label] % 8], "alpha": 0.6, "relpos": (0, 0.5)},
            zorder=1,
        )


def apart(wanted: list[float], gap: float) -> list[float]:
    """Positions in rising order, at least a gap apart, with a mean shift of zero from the wanted ones."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap) if places else place)
    shift = sum(place - target for place, target in zip(places, wanted, strict=True)) / len(wanted)
    return [place - shift for place in places]
