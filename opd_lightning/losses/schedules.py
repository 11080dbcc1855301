"""Schedules: numbers that follow the optimizer step, and nothing else, so that a resumed run has them, too."""

import math
from collections.abc import Callable, Mapping
from typing import Any

Schedule = Callable[[int], float]
"""Maps optimizer steps done, from 0, to a number."""

TERMS = ("divergence", "policy_gradient", "cross_entropy", "reference")
"""Names of the terms of an objective, which coefficients and gates refer to."""


class Linear:
    """`start` up to step `begin`, then on a line to `end`, which it has from step `begin + steps` on.

    TAID raises the share of its interpolation so (arXiv 2501.16937, without its adaptive speed).

    Args:
        start, end: the numbers.
        steps: optimizer steps between them.
        begin: steps before.

    Raises:
        ValueError: steps < 1 or begin < 0.
    """

    def __init__(self, start: float, end: float, steps: int, begin: int = 0):
        if steps < 1 or begin < 0:
            raise ValueError(f"a schedule of steps={steps} from begin={begin} never moves; take steps >= 1 and begin >= 0.")
        self.start, self.end, self.steps, self.begin = start, end, steps, begin

    def __call__(self, step: int) -> float:
        """The number at a step."""
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return (1 - self.shape(done)) * self.start + self.shape(done) * self.end

    def shape(self, done: float) -> float:
        """How far the number is, in [0, 1], from how far the steps are."""
        return done


class Cosine(Linear):
    """As `Linear`, along half a cosine: slow at both ends."""

    def shape(self, done: float) -> float:
        """(1 - cos(pi done)) / 2."""
        return (1 - math.cos(math.pi * done)) / 2


def value_at(number: float | Schedule, step: int) -> float:
    """A number, or that of a schedule at a step."""
    return float(number(step)) if callable(number) else float(number)


def ends_of(number: Any) -> tuple[float, ...]:
    """The numbers between which a schedule moves; a number itself, and nothing for schedules that do not say it."""
    if not callable(number):
        return (number,)
    return (number.start, number.end) if hasattr(number, "start") and hasattr(number, "end") else ()


def check_coefficients(coefficients: Mapping[str, float | Schedule], beyond: bool) -> None:
    """Check the coefficients, and both ends of scheduled ones.

    Args:
        beyond: whether the reference's may be negative.

    Raises:
        ValueError: one is of no term, no number, or too low.
    """
    for name, number in coefficients.items():
        if name not in TERMS:
            raise ValueError(f"loss.coefficients.{name}={number} is of no term; terms are {', '.join(TERMS)}.")
        for value in ends_of(number):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > -1e9:
                raise ValueError(f"loss.coefficients.{name}={value!r} must be a number; 0 drops the term.")
            if value >= 0:
                continue
            if name != "reference" or not beyond:
                raise ValueError(
                    f"loss.coefficients.{name}={value!r} must be a number that is not negative; 0 drops the term. Only the "
                    "reference's may be, between two reverse KLs (loss/divergence=reverse_kl loss/reference=reverse_kl)."
                )
            if not value + min(ends_of(coefficients["divergence"]), default=0.0) > 0:
                raise ValueError(
                    f"loss.coefficients.reference={value!r} outweighs the divergence's, and such a loss has no "
                    "minimum; raise that: for a lambda of 1.25 take 1.25 and -0.25."
                )
