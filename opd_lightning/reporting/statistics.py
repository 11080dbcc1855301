"""Intervals of differences between methods, over seeds.

The default is Student's t over per-seed paired differences. An interval over the prompts of a single run does not cover the
variation between seeds, so it never supports a verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A paired difference between two methods.

    Attributes:
        mean: of the differences.
        low, high: its 95 % interval.
        seeds: pairs of runs.
        p: two-sided p-value; 1 for a single seed, and where all differences are equal.
        over: what the interval is over: "seeds", or "prompts, this run only".
    """

    mean: float
    low: float
    high: float
    seeds: int
    p: float
    over: str = "seeds"

    @property
    def alike(self) -> bool:
        """Whether several seeds show the same difference."""
        return self.seeds > 1 and self.low == self.high

    @property
    def bounded(self) -> bool:
        """Whether the difference has an interval; that of a single seed has one over prompts only."""
        return isfinite(self.low) and isfinite(self.high)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]" if self.bounded else f"{self.mean:+.3f}"


def over_seeds(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """first - second over the seeds that both have, with Student's t interval.

    With a single seed the interval is infinite and is not shown. Where all differences are equal, as when both methods are
    always perfect, the interval has width 0 and p is 1.

    Raises:
        ValueError: no seed is in both.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise ValueError("no seed is in both methods, so nothing can be paired; give both the same seeds.")
    d = np.array([first[s] - second[s] for s in seeds])
    n, mean = len(d), float(d.mean())
    if n == 1:
        return Difference(mean, -inf, inf, n, 1.0)
    error = float(d.std(ddof=1)) / sqrt(n)
    if error < 1e-12:
        return Difference(mean, mean, mean, n, 1.0)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    return Difference(mean, mean - half, mean + half, n, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def over_prompts(first: Sequence[float], second: Sequence[float], draws: int = 4000, seed: int = 0) -> Difference:
    """first - second on the same prompts of one run each, by a percentile bootstrap over prompts; p is 1."""
    d = np.asarray(first, float) - np.asarray(second, float)
    picked = np.random.default_rng(seed).integers(0, len(d), (draws, len(d)))
    low, high = np.quantile(d[picked].mean(1), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Difference(float(d.mean()), float(low), float(high), 1, 1.0, "prompts, this run only")


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple comparisons (Holm 1979), which controls the family-wise error rate."""
    order = np.argsort(p)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
