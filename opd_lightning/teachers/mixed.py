"""A mixed teacher: a weighted average of several teachers' distributions on the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.head import fitted
from opd_lightning.losses.targets import FullLogits
from opd_lightning.teachers.base import CombinedScores, Composite
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.vocabulary import valid_ids_of


@dataclass(frozen=True)
class MixedScores(CombinedScores):
    """Scores of several teachers on the same N tokens.

    Attributes:
        parts: each teacher's scores.
        weights: one for each part, with sum 1.
        space: "probability" averages probabilities, "log" log-probabilities, renormalised.
    """

    parts: Sequence[Any]
    weights: Sequence[float]
    space: str
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor | None:
        """The tokens for which all parts have a target."""
        masks = [part.valid for part in self.parts if part.valid is not None]
        return torch.stack(masks).all(0) if masks else None

    @property
    def cost(self) -> Cost:
        """The cost of all parts."""
        return sum((part.cost for part in self.parts), Cost())

    def take(self, index: Tensor | slice) -> "MixedScores":
        """The rows at an index of the packed axis."""
        return MixedScores([part.take(index) for part in self.parts], self.weights, self.space, self.metrics)

    def chunk(self, rows: slice, out: Tensor | None = None) -> FullLogits:
        """The mixture's log-probabilities [n, V], as logits."""
        mixed: Tensor | None = None
        valid, valid_ids = self.valid, self.valid_ids
        for part, weight in zip(self.parts, self.weights, strict=True):
            target = part.chunk(rows)
            if valid_ids_of(part) != valid_ids:  # renormalised before mixing
                target = fitted(target, valid_ids_of(part), valid_ids, target.logits.dtype)
            log_p = target.log_probs(1.0).log_p
            if self.space == "log":
                mixed = weight * log_p if mixed is None else mixed.add_(log_p, alpha=weight)
            else:
                scaled = log_p + torch.log(torch.tensor(weight, dtype=log_p.dtype))
                mixed = scaled if mixed is None else torch.logaddexp(mixed, scaled)
        assert mixed is not None
        return FullLogits(mixed, None if valid is None else valid[rows])


class MixedTeacher(Composite):
    """A weighted average of the teachers' distributions, on every sample.

    Args:
        teachers: the teachers by name; each provides the full vocabulary.
        weights: positive weights by name, scaled to sum 1. None weighs all equally.
        space: "probability" averages probabilities (a mixture of experts), "log" log-probabilities (a product of experts).

    Raises:
        ValueError: a weight is of no teacher or not positive, or a teacher does not provide the full vocabulary.
    """

    def __init__(self, teachers: dict[str, Any], weights: dict[str, float] | None = None, space: str = "probability"):
        super().__init__(teachers)
        by_name = dict.fromkeys(teachers, 1.0) if weights is None else dict(weights)
        if set(by_name) != set(teachers) or not all(weight > 0 for weight in by_name.values()):
            raise ValueError(f"teacher.weights={by_name} must give each of {sorted(teachers)} a positive number.")
        if space not in ("probability", "log"):
            raise ValueError(f"teacher.space={space!r} is unknown; choose probability or log.")
        if "full" not in self.provides:
            raise ValueError("teacher=mixed needs the whole vocabulary of each of its teachers; choose others.")
        self.space = space
        self.weights = {name: by_name[name] / sum(by_name.values()) for name in teachers}

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> MixedScores:
        """The mixture of all teachers' scores of the samples."""
        parts = {name: teacher.score(samples, max_tokens) for name, teacher in self.teachers.items()}
        metrics = {f"{name}_{key}": values for name, part in parts.items() for key, values in part.metrics.items()}
        return MixedScores(list(parts.values()), list(self.weights.values()), self.space, metrics)
