"""The two pictures of most experiments: curves against a number, and one dot per run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from opd_lightning.report.figures import COLOURS, LINES, MARKERS

Curve = Mapping[float, Sequence[float]]
"""Values of several runs at each x."""


def curves(
    path: Path, panels: Mapping[str, Mapping[str, Curve]], x: str, y: str, log: bool = False, zero: bool = False
) -> None:
    """A panel per title, a curve per label: means, with bars from the least to the greatest run; a line at zero if asked."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.2 + 3.4 * len(panels), 3.6), sharey=True, squeeze=False)
    for axes, (title, some) in zip(all_axes[0], panels.items(), strict=True):
        for i, (label, curve) in enumerate(some.items()):
            points = sorted((at, values) for at, values in curve.items() if values)
            if not points:
                continue
            middle = [mean(v) for _, v in points]
            spread = [[m - min(v) for m, (_, v) in zip(middle, points, strict=True)]]
            spread.append([max(v) - m for m, (_, v) in zip(middle, points, strict=True)])
            axes.errorbar(
                [at for at, _ in points],
                middle,
                spread,
                color=COLOURS[i % 8],
                linestyle=LINES[(i + i // 8) % 4],
                marker=MARKERS[(i + i // 8) % 8],
                markersize=4,
                linewidth=1.3,
                capsize=2,
                label=label,
            )
        if zero:
            axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=x, xscale="log" if log else "linear")
        at = sorted({at for curve in some.values() for at in curve})
        if len(at) <= 6:
            axes.set_xticks(at, [f"{value:g}" for value in at])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    all_axes[0][0].set_ylabel(y)
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def dots(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], y: str) -> None:
    """A panel per title: one dot per run above its label, a bar at their mean."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(0.8 + 3.1 * len(panels), 3.8), sharey=True, squeeze=False)
    for axes, (title, some) in zip(all_axes[0], panels.items(), strict=True):
        for i, values in enumerate(some.values()):
            axes.plot([i] * len(values), values, "o", color=COLOURS[i % 8], markersize=4)
            if values:
                axes.plot([i - 0.3, i + 0.3], [mean(values)] * 2, color=COLOURS[i % 8])
        axes.set_xticks(range(len(some)), list(some), rotation=60, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.25)
    all_axes[0][0].set_ylabel(y)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)
