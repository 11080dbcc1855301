"""Estimates: numbers with their intervals over prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, sqrt

Z95 = 1.959964
"""The normal distribution's 97.5 % quantile."""


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: the mean.
        prompts: how many prompts it is the mean over, or None.
        low, high: its 95 % interval over prompts, or None; it does not cover other seeds.
    """

    value: float
    prompts: int | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(values: Sequence[float]) -> Estimate:
    """The mean of numbers in [0, 1], one per prompt, with Wilson's score interval (1927).

    For numbers strictly between 0 and 1 the interval is conservative: they vary less than 0/1 values of equal mean.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an evaluation needs at least one prompt; check task.n_eval.")
    mean = sum(values) / n
    centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return Estimate(mean, n, max(0.0, centre - half), min(1.0, centre + half))


def average(values: Sequence[float]) -> Estimate:
    """A mean over prompts of any numbers, with the normal interval of a mean (none for a single prompt)."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Estimate(mean, n)
    half = Z95 * sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Estimate(mean, n, mean - half, mean + half)


def headlines(numbers: Iterable[str]) -> list[str]:
    """The numbers to show: without the step, the validation split and single skills ("prior/sort/accuracy")."""
    names = [name for name in numbers if name != "step" and not name.startswith("validation/")]
    parts = {name: name.split("/") for name in names}
    return [name for name in names if not (len(parts[name]) == 3 and f"{parts[name][0]}/{parts[name][2]}" in parts)]


KINDS = ("accuracy", "harness/", "score", "avg@", "pass@", "nll", "log_likelihood", "kl")
"""Kinds of numbers by what they say about a model, the first the most."""


def leading(numbers: Iterable[str], most: int = 4) -> list[str]:
    """The few numbers to show in a line: the first of KINDS that were measured, without perturbations and single skills."""
    names = headlines(numbers) or [name for name in numbers if name != "step" and name.count("/") < 3]
    plain = [name for name in names if not name.startswith(("robust/", "teacher/"))] or names
    kinds = [[name for name in plain if kind in name.rpartition("/")[2] or name.startswith(kind)] for kind in KINDS]
    return (list(dict.fromkeys(name for group in kinds for name in group)) or plain)[:most]


def pass_at(k: int, n: int, solved: int) -> float:
    """Probability that at least one of k of a prompt's n samples is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1), c = `solved` of the n samples being right.

    Raises:
        ValueError: k is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per prompt, and there are {n}.")
    return 1.0 - comb(n - solved, k) / comb(n, k)
