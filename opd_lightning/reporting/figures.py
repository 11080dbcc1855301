"""Figures of a study: new against prior skills, learning curves, costs, divergence, robustness and recovery."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from opd_lightning.reporting.headline import seed_counts
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels

# Okabe and Ito's palette, which colour-blind readers can distinguish; in black and white, marker and line show the method.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
NARROW = 26
"""Characters in a line of a legend; longer names are wrapped."""
NEW, PRIOR = "accuracy on the new skill (greedy, held-out)", "accuracy on prior skills (greedy, held-out)"

Figure = tuple[str, tuple[str, ...], Callable[[list[Run], Path], None], str]


def draw(runs: list[Run], folder: Path) -> list[tuple[Path, str]]:
    """Draw every figure whose numbers the runs have.

    Returns:
        (file, caption) of each figure.
    """
    drawn = []
    for name, needs, picture, caption in figures():
        if all(key in run.evaluation["end"] for key in needs for run in runs):
            path = folder / f"{name}.png"
            picture(runs, path)
            drawn.append((path, f"{caption} Seeds per method: {seed_counts(runs)}."))
    return drawn


def figures() -> list[Figure]:
    """Each figure's name, the numbers it needs, its drawing function and its caption."""
    return [
        (
            "forgetting",
            ("new/accuracy", "prior/accuracy"),
            forgetting,
            "Prior skills against the new skill along training, one line per run from the start model (top left) to its "
            "last update (filled marker). Further up at the same place across: less forgotten for the same skill. No interval "
            "is drawn, every run is.",
        ),
        (
            "cost",
            ("new/accuracy",),
            cost,
            "Accuracy on the new skill against what it had cost: tokens that the student wrote (none where the data set or the "
            "teacher writes), FLOPs of rollouts, teacher, forward and backward passes, and seconds of this machine without "
            "evaluation. Logarithmic; one line per run, no interval.",
        ),
        (
            "learning",
            ("new/accuracy",),
            learning,
            "Accuracy on the new skill and on prior skills against optimizer updates: means over seeds, bands from the lowest "
            "to the highest seed, for as long as all seeds of a method train.",
        ),
        (
            "divergence",
            ("prior/accuracy", "start/new/forward_kl"),
            divergence,
            "Prior skills against the distance from the start model on prompts of the new skill, all evaluations of all runs. "
            "If the distance alone decided what is forgotten, all methods would lie on one curve.",
        ),
        (
            "robustness",
            ("robust/none",),
            robustness,
            "Accuracy after training under one perturbation at a time, on the same prompts: bars are means over seeds, lines "
            "from the lowest to the highest seed.",
        ),
        (
            "recovery",
            ("heldout/reverse_kl", "heldout/log_likelihood"),
            recovery,
            "Distance to the teacher on the student's own held-out completions (left, nats per token, logarithmic) and "
            "log-likelihood of ordinary held-out answers (right, nats per token; dashed: the teacher's). No interval is drawn, "
            "every run is.",
        ),
    ]


def style(i: int) -> dict[str, Any]:
    """Line style of the i-th cell."""
    return {"color": COLOURS[i % 8], "linewidth": 1.4, "linestyle": LINES[i % 4]}


def lines(axes: Axes, runs: list[Run], x: Callable[[Run, int], float], y: str) -> None:
    """One line per run, a colour and a marker per cell; rows without the number are left out."""
    for i, (label, cell) in enumerate(labels(runs).items()):
        for j, run in enumerate(cell):
            rows = [k for k, row in enumerate(run.evaluation["history"]) if y in row]
            xs, ys = [x(run, k) for k in rows], [run.evaluation["history"][k][y] for k in rows]
            axes.plot(xs, ys, **style(i), label=None if j else label)
            axes.plot(xs[-1:], ys[-1:], MARKERS[i % 8], color=COLOURS[i % 8], markersize=7)
    axes.grid(alpha=0.25)


def legend(axes: Axes) -> None:
    """Add a legend of methods, in a smaller font if there are many."""
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles, [fill(name, NARROW) for name in names], frameon=False, fontsize=min(10.0, 100 / max(1, len(names))))


def number(name: str) -> Callable[[Run, int], float]:
    """An evaluation's number at the k-th evaluation."""
    return lambda run, k: run.evaluation["history"][k][name]


def spent(name: str) -> Callable[[Run, int], float]:
    """A run's cost at its k-th evaluation; NaN for 0, which a logarithmic axis cannot show."""
    return lambda run, k: run.evaluation["costs"][k][name] or float("nan")


def forgetting(runs: list[Run], path: Path) -> None:
    """Plot prior accuracy against new accuracy."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    lines(axes, runs, number("new/accuracy"), "prior/accuracy")
    axes.set(xlabel=NEW, ylabel=PRIOR)
    legend(axes)
    save(figure, path)


def cost(runs: list[Run], path: Path) -> None:
    """Plot new accuracy against tokens, FLOPs and seconds."""
    axis_labels = {"student_tokens": "tokens the student wrote", "flops": "FLOPs", "seconds": "seconds"}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, (name, label) in zip(panels, axis_labels.items(), strict=True):
        lines(axes, runs, spent(name), "new/accuracy")
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten would run into each other
    panels[0].set(ylabel=NEW.replace(" (", "\n("))
    legend(panels[1])
    save(figure, path)


def learning(runs: list[Run], path: Path) -> None:
    """Plot new and prior accuracy against updates, with bands."""
    kept = [key for key in ("new/accuracy", "prior/accuracy") if all(key in run.evaluation["end"] for run in runs)]
    figure, panels = plt.subplots(1, len(kept), figsize=(5 * len(kept), 3.9), layout="constrained", squeeze=False)
    for axes, key in zip(panels[0], kept, strict=True):
        for i, (label, cell) in enumerate(labels(runs).items()):
            rows = [{row["step"]: row[key] for row in run.evaluation["history"] if key in row} for run in cell]
            steps = sorted(set.intersection(*(set(row) for row in rows)))
            values = [[row[step] for row in rows] for step in steps]
            axes.plot(steps, [mean(per_seed) for per_seed in values], **style(i), label=label)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=COLOURS[i % 8], alpha=0.15, lw=0)
        axes.set(xlabel="optimizer updates", ylabel=NEW if key.startswith("new") else PRIOR)
        axes.grid(alpha=0.25)
    legend(panels[0][0])
    save(figure, path)


def divergence(runs: list[Run], path: Path) -> None:
    """Plot prior accuracy against KL to the start model."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for i, (label, cell) in enumerate(labels(runs).items()):
        rows = [row for run in cell for row in run.evaluation["history"] if "start/new/forward_kl" in row]
        xs, ys = [row["start/new/forward_kl"] for row in rows], [row["prior/accuracy"] for row in rows]
        axes.plot(xs, ys, MARKERS[i % 8], color=COLOURS[i % 8], markersize=5, alpha=0.7, label=label, linestyle="")
    axes.set(xlabel="KL(start model || model) on new prompts, nats per token", ylabel=PRIOR)
    legend(axes)
    axes.grid(alpha=0.25)
    save(figure, path)


def robustness(runs: list[Run], path: Path) -> None:
    """Plot accuracy under each perturbation, grouped by perturbation."""
    summary = ("robust/none", "robust/mean", "robust/worst")
    names = [n for n in runs[0].evaluation["end"] if n.startswith("robust/") and n not in summary]
    names = [n for n in names if all(n in run.evaluation["end"] for run in runs)]
    names = ["robust/none", *names, "robust/mean", "robust/worst"]
    cells = labels(runs)
    figure, axes = plt.subplots(figsize=(min(11, 0.7 * len(names) + 3), 4), layout="constrained")
    width = 0.8 / len(cells)
    for i, (label, cell) in enumerate(cells.items()):
        values = [[run.evaluation["end"][n] for run in cell] for n in names]
        middle = [mean(per_seed) for per_seed in values]
        spread = [
            [m - min(v) for m, v in zip(middle, values, strict=True)],
            [max(v) - m for m, v in zip(middle, values, strict=True)],
        ]
        at = [k + (i - (len(cells) - 1) / 2) * width for k in range(len(names))]
        hatch = (None, "//", "..", "xx", "--", "\\\\", "oo", "++")[i % 8]
        axes.bar(at, middle, width, yerr=spread, color=COLOURS[i % 8], label=label, hatch=hatch, edgecolor="white", capsize=2)
    axes.set_xticks(range(len(names)), [n.split("/")[1].replace("_", " ") for n in names], rotation=35, ha="right", fontsize=9)
    axes.set(ylabel=NEW.replace(" (greedy, held-out)", ""), ylim=(0, 1.02))
    handles, named = axes.get_legend_handles_labels()
    fitting = int(10 * figure.get_figwidth() / (5 + min(NARROW, max(map(len, named)))))  # about ten characters to an inch
    texts = [fill(name, NARROW) for name in named]
    axes.legend(handles, texts, frameon=False, ncols=max(1, min(6, fitting)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def recovery(runs: list[Run], path: Path) -> None:
    """Plot distance to the teacher and likelihood of ordinary answers against updates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    lines(left, runs, number("step"), "heldout/reverse_kl")
    left.set(xlabel="optimizer updates", ylabel="KL(student || teacher),\nnats per token", yscale="log")
    legend(left)
    lines(right, runs, number("step"), "heldout/log_likelihood")
    teacher = runs[0].evaluation["end"].get("heldout/teacher_log_likelihood")
    if teacher is not None:
        right.axhline(teacher, color="#555555", linestyle="--", linewidth=1)
    right.set(xlabel="optimizer updates", ylabel="log-likelihood of ordinary\nanswers, nats per token")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write the figure and close it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
