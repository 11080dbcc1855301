"""Does the distance from the start model tell how much is forgotten? Rank correlations within runs and between methods."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations, product
from statistics import mean, median

import numpy as np
from scipy.stats import rankdata, spearmanr

from experiments.grid import Row, picked, spread, table

KEPT = "prior/accuracy"
DISTANCES = {
    "start/new/forward_kl": "KL(start \\|\\| model), new prompts",
    "start/new/reverse_kl": "KL(model \\|\\| start), new prompts",
    "start/prior/forward_kl": "KL(start \\|\\| model), prior prompts",
}


def law(
    checkpoints: list[Row], starts: Sequence[str], groups: Mapping[str, Iterable[str]], rate: str, kin: Callable[[str], str]
) -> None:
    """Spearman's rank correlation of distance and prior accuracy, after the start: within each run, and between the arms of
    each group where their runs at this rate end; the latter also over start models that are no kin."""
    print(f"\nRank correlation of distance and {KEPT}, within runs, and between methods at the end of runs at {rate}\n")
    lines = []
    for name in starts:
        mine = by_run(checkpoints, name)
        between = (told(*means(ends(mine, rate), arms, kl)) for arms, kl in product(groups.values(), DISTANCES))
        lines.append([f"`{name}`", *(within(mine, kl) for kl in DISTANCES), *between])
    ways = product(("within a run", *groups), DISTANCES.values())
    print(table(["", *(f"{way}: {distance}" for way, distance in ways)], lines))
    print("\nBetween methods, mean over kinds and seeds of the mean correlation of their start models\n")
    lines = [
        [group, *(over_kinds(checkpoints, starts, arms, kl, rate, kin) for kl in DISTANCES)] for group, arms in groups.items()
    ]
    print(table(["", *DISTANCES.values()], lines))


def by_run(checkpoints: list[Row], name: str) -> list[list[Row]]:
    """The checkpoints of each run from a start model, without the start."""
    runs: dict[tuple, list[Row]] = {}
    for c in checkpoints:
        if c["start"] == name and c["step"] > 0:
            runs.setdefault((c["arm"], c["lr"], c["seed"]), []).append(c)
    return list(runs.values())


def within(runs: list[list[Row]], kl: str) -> str:
    """Median, least and greatest correlation of the runs in which both change."""
    varied = [some for some in runs if len({c[kl] for c in some}) > 1 < len({c[KEPT] for c in some})]
    found = [spearmanr([c[kl] for c in some], [c[KEPT] for c in some]).statistic for some in varied]
    return f"{median(found):.2f} [{min(found):.2f}, {max(found):.2f}] ({len(found)} runs)" if found else ""


def ends(runs: list[list[Row]], rate: str) -> list[Row]:
    """Where the runs at this rate end."""
    return [some[-1] for some in runs if some[0]["lr"] == rate]


def means(rows: list[Row], arms: Iterable[str], kl: str) -> tuple[list[float], list[float]]:
    """Distance and prior accuracy of each arm that there is."""
    some = [mine for arm in arms if (mine := picked(rows, arm=arm))]
    return [mean(c[kl] for c in mine) for mine in some], [mean(c[KEPT] for c in mine) for mine in some]


def told(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Spearman's rank correlation, with its p-value over all orders of so few points."""
    if len(xs) < 3:
        return ""
    rho, all_orders = correlation(xs, ys), np.array(list(permutations(centred(ys)))) @ centred(xs)
    p = np.mean(np.abs(all_orders) >= abs(centred(xs) @ centred(ys)) - 1e-9)
    return f"{rho:+.2f} ({f'p = {p:.3f}' if p >= 0.001 else 'p < 0.001'})"


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(xs, ys).statistic)


def centred(values: Sequence[float]) -> np.ndarray:
    """Ranks about their mean."""
    return rankdata(values) - (len(values) + 1) / 2


def over_kinds(
    checkpoints: list[Row], starts: Sequence[str], arms: Iterable[str], kl: str, rate: str, kin: Callable[[str], str]
) -> str:
    """Start models of one kind and seed are no independent draws, so their mean is one."""
    found: dict[str, list[float]] = {}
    for name in starts:
        xs, ys = means(ends(by_run(checkpoints, name), rate), arms, kl)
        if len(xs) > 2:
            found.setdefault(kin(name), []).append(correlation(xs, ys))
    return spread([mean(some) for some in found.values()]) if found else ""
