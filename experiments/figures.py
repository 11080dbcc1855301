"""The two pictures of most experiments: curves against a number, and one dot per run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from opd_lightning.report.figures import COLOURS, LINES, MARKERS

PALETTE = (*COLOURS, "#7F7F7F")
"""A ninth colour, for nine divergences."""
Curve = Mapping[float, Sequence[float]]
"""Values of several runs at each x."""


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    x: str,
    y: str,
    log: bool = False,
    zero: bool = False,
    each: bool = False,
    columns: int = 4,
    share: bool = True,
) -> None:
    """A panel per title, a curve per label: means, with bars from the least to the greatest run.

    Args:
        log, zero: a logarithmic x axis; a line at zero.
        each: a line per run instead of their mean; then every x has the same runs in the same order.
        columns: panels in a row, at most.
        share: one y axis for all panels.
    """
    figure, all_axes = arranged(panels, columns, (3.4, 3.6), 3.2, share)
    labels = list(dict.fromkeys(label for some in panels.values() for label in some))
    handles = {}
    for axes, (title, some) in zip(all_axes, panels.items(), strict=True):
        for label, curve in some.items():
            points = sorted((at, values) for at, values in curve.items() if values)
            if not points:
                continue
            i = labels.index(label)
            look = {"color": PALETTE[i % 9], "linestyle": LINES[(i + i // 9) % 4], "linewidth": 1.3}
            at, values = [at for at, _ in points], [v for _, v in points]
            if each:
                for run in zip(*values, strict=True):
                    (handles[label],) = axes.plot(at, run, **look)
                continue
            middle = [mean(v) for v in values]
            ends = [[m - min(v) for m, v in zip(middle, values, strict=True)]]
            ends.append([max(v) - m for m, v in zip(middle, values, strict=True)])
            look |= {"marker": MARKERS[(i + i // 8) % 8], "markersize": 4, "capsize": 2}
            handles[label] = axes.errorbar(at, middle, ends, **look)
        if zero:
            axes.axhline(0.0, color="black", linewidth=0.8)
        if not share and all(value >= 0 for curve in some.values() for values in curve.values() for value in values):
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=x, xscale="log" if log else "linear")
        at = sorted({at for curve in some.values() for at in curve})
        if len(at) <= 6:
            axes.set_xticks(at, [f"{value:g}" for value in at])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    for axes in all_axes[::columns]:
        axes.set_ylabel(y)
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def dots(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], y: str, columns: int = 4) -> None:
    """A panel per title, so many in a row: one dot per run above its label, a bar at their mean."""
    figure, all_axes = arranged(panels, columns, (3.1, 3.8), 0.8)
    for axes, (title, some) in zip(all_axes, panels.items(), strict=True):
        for i, values in enumerate(some.values()):
            axes.plot([i] * len(values), values, "o", color=PALETTE[i % 9], markersize=4)
            if values:
                axes.plot([i - 0.3, i + 0.3], [mean(values)] * 2, color=PALETTE[i % 9])
        axes.set_xticks(range(len(some)), list(some), rotation=60, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.25)
    for axes in all_axes[::columns]:
        axes.set_ylabel(y)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def arranged(panels: Mapping, columns: int, size: tuple[float, float], beside: float, share: bool = True):
    """A figure and its axes, row by row; each panel of this size in inches, and this much beside them."""
    across = min(columns, len(panels))
    down = -(-len(panels) // across)
    inches = (beside + size[0] * across, size[1] * down)
    figure, axes = plt.subplots(down, across, figsize=inches, sharey=share, squeeze=False, layout="constrained")
    for unused in axes.flat[len(panels) :]:
        unused.set_axis_off()
    return figure, list(axes.flat[: len(panels)])
