"""Fingerprints: numbers of a model on a few fixed tokens, by which a resumed run and a resumed scoring know it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.generation.probe import Probe

ROUNDING = {torch.float32: 0.01, torch.float64: 0.01}
"""Nats per token by which one model may differ from itself on another device; other dtypes take `COARSE`."""
COARSE = 0.1


@dataclass(frozen=True)
class Fingerprint:
    """Numbers of a model on fixed tokens.

    Attributes:
        name: the model, as the configuration names it.
        numbers: such as log-probabilities of the tokens of a probe.
        tolerance: how much these may differ, on average, while the model is the same.
    """

    name: str
    numbers: Tensor
    tolerance: float

    @classmethod
    def of(cls, name: str, student: Any) -> "Fingerprint":
        """The fingerprint of a model in this process."""
        dtype = next(student.lm.parameters()).dtype
        return cls(name, Probe(student.head.known).of(student), ROUNDING.get(dtype, COARSE))

    def difference(self, numbers: Any) -> float:
        """The mean absolute difference from earlier numbers; infinite where these are of other tokens."""
        earlier = torch.as_tensor(numbers, dtype=torch.float32)
        ours = self.numbers.float()
        if earlier.shape != ours.shape:
            return float("inf")
        return float(torch.where(earlier == ours, 0.0, (earlier - ours).abs()).mean())


def another_model(before: Mapping[str, Any], now: Mapping[str, Fingerprint]) -> str | None:
    """The sentence on the first model that is not what it was; None where all are, or were not noted.

    Args:
        before: the numbers of earlier fingerprints, by the model's role.
        now: the fingerprints, by role.
    """
    for role, fingerprint in now.items():
        difference = fingerprint.difference(before[role]) if role in before else 0.0
        if not difference <= fingerprint.tolerance:
            return (
                f"{fingerprint.name}: the {role} is not what it was (its numbers for the same tokens differ by "
                f"{difference:.2g} nats on average, and {fingerprint.tolerance:g} is accepted)"
            )
    return None
