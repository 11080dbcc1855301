"""Seeds that were added when the results of the first ones were known, because these had left differences undecided.

Who looks after three seeds and, where nothing is decided, once more after five leaves 0 out in about 9 of 100 cases in which
there is nothing (normal differences, Student's t), not in 5. What the added seeds show by themselves is free of the first look.

python -m experiments.looks      # simulates that share
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.grid import Row, paired, picked
from opd_lightning.report.statistics import Difference, over_seeds

FIRST, ADDED = (0, 1, 2), (3, 4)
SEEDS = FIRST + ADDED
LOOKS = {"seeds 0 to 2, at first": FIRST, "3 and 4, added": ADDED, "all five": SEEDS}
DOUBLED = "p of all five, doubled for two looks"  # Bonferroni


def by_look(rows: Sequence[Row], arm: str, baseline: str, number: str) -> list[str]:
    """A difference by when its seeds were decided on, a cell for each of LOOKS and DOUBLED."""
    told = [paired(of(rows, seeds), arm, baseline, number) for seeds in LOOKS.values()]
    last = difference(rows, arm, baseline, number)
    return [*told, f"{min(1.0, 2 * last.p):.3f}" if last else ""]


def changed(rows: Sequence[Row], arm: str, baseline: str, number: str) -> bool:
    """Do the added seeds change the verdict?"""
    first, last = (difference(of(rows, seeds), arm, baseline, number) for seeds in (FIRST, SEEDS))
    return first is not None and last is not None and verdict(first) != verdict(last)


def of(rows: Sequence[Row], seeds: Sequence[int]) -> list[Row]:
    """The rows with these seeds."""
    return [r for r in rows if r.get("seed") in seeds]


def difference(rows: Sequence[Row], arm: str, baseline: str, number: str) -> Difference | None:
    """Of an arm to another one, paired by seed; None without pairs."""
    mine, other = ({r["seed"]: r[number] for r in picked(rows, arm=a) if number in r} for a in (arm, baseline))
    return over_seeds(mine, other) if set(mine) & set(other) else None


def verdict(told: Difference) -> int:
    """Above (1) or below (-1) zero, or undecided (0)."""
    return (told.low > 0) - (told.high < 0)


def simulated(studies: int = 1_000_000) -> float:
    """Share of studies without a difference whose interval of FIRST, or else that of SEEDS, leaves 0 out."""
    draws = np.random.default_rng(0).normal(size=(studies, len(SEEDS)))
    told = [stats.ttest_1samp(draws[:, : len(seeds)], 0, axis=1).pvalue < 0.05 for seeds in (FIRST, SEEDS)]
    return float(np.mean(told[0] | told[1]))


if __name__ == "__main__":
    print(f"{simulated():.4f}")
