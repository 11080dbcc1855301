"""Figures of a study: what was learned against what was kept, and how fast."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, or opened
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from opd_lightning.report.runs import Run
from opd_lightning.report.table import by_cell

# Okabe and Ito's palette, told apart by colour-blind readers; the marker and the line tell the method in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(runs: list[Run], folder: Path) -> list[tuple[Path, str]]:
    """Draw what the runs have numbers for.

    Returns:
        (file, caption) of each figure.
    """
    n = {len(cell) for cell in by_cell(runs).values()}
    seeds = f"{min(n)}" if len(n) == 1 else f"{min(n)} to {max(n)}"
    drawn = []
    for name, needs, picture, caption in (
        (
            "forgetting",
            ("new/accuracy", "prior/accuracy"),
            forgetting,
            "Prior skills against the new skill along training, one line per run from the start model (top left) to its "
            "last step (filled marker). Further up at the same place across: less forgotten for the same skill.",
        ),
        (
            "learning",
            ("new/accuracy",),
            learning,
            "Accuracy on the new skill against optimizer updates, one line per run. All methods see the same prompts.",
        ),
        (
            "recovery",
            ("heldout/reverse_kl", "heldout/log_likelihood"),
            recovery,
            "Distance to the teacher on the student's own held-out completions (left, nats per token, logarithmic) and "
            "log-likelihood of ordinary held-out answers (right, nats per token; dashed: the teacher's).",
        ),
    ):
        if all(key in run.evaluation["end"] for key in needs for run in runs):
            path = folder / f"{name}.png"
            picture(runs, path)
            drawn.append((path, f"{caption} Seeds per method: {seeds}; no interval is drawn, every run is."))
    return drawn


def lines(axes: Axes, runs: list[Run], x: Callable[[dict], float], y: str) -> None:
    """One line per run, a colour and a marker per cell."""
    for i, cell in enumerate(by_cell(runs).values()):
        style: dict[str, Any] = {"color": COLOURS[i % 8], "linewidth": 1.4, "linestyle": ("-", "--", ":", "-.")[i % 4]}
        for j, run in enumerate(cell):
            history = run.evaluation["history"]
            xs, ys = [x(row) for row in history], [row[y] for row in history]
            axes.plot(xs, ys, **style, label=None if j else cell[0].name)
            axes.plot(xs[-1], ys[-1], MARKERS[i % 8], color=style["color"], markersize=7)
    axes.grid(alpha=0.25)


def forgetting(runs: list[Run], path: Path) -> None:
    """Prior accuracy against new accuracy."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    lines(axes, runs, lambda row: row["new/accuracy"], "prior/accuracy")
    axes.set(xlabel="accuracy on the new skill (greedy, held-out)", ylabel="accuracy on prior skills (greedy, held-out)")
    axes.legend(frameon=False)
    save(figure, path)


def learning(runs: list[Run], path: Path) -> None:
    """New accuracy against updates."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    lines(axes, runs, lambda row: row["step"], "new/accuracy")
    axes.set(xlabel="optimizer updates", ylabel="accuracy on the new skill (greedy, held-out)")
    axes.legend(frameon=False)
    save(figure, path)


def recovery(runs: list[Run], path: Path) -> None:
    """Distance to the teacher and likelihood of ordinary answers against updates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    lines(left, runs, lambda row: row["step"], "heldout/reverse_kl")
    left.set(xlabel="optimizer updates", ylabel="KL(student || teacher),\nnats per token", yscale="log")
    left.legend(frameon=False)
    lines(right, runs, lambda row: row["step"], "heldout/log_likelihood")
    teacher = runs[0].evaluation["end"].get("heldout/teacher_log_likelihood")
    if teacher is not None:
        right.axhline(teacher, color="#555555", linestyle="--", linewidth=1)
    right.set(xlabel="optimizer updates", ylabel="log-likelihood of ordinary\nanswers, nats per token")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write and close."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
