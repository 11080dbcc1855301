"""A mixed teacher: a weighted average of several teachers' distributions on the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Provides
from opd_lightning.losses.head import fitted
from opd_lightning.losses.joined_targets import MixedCoarse, mixture
from opd_lightning.losses.targets import FullLogits, SampledLogProbs
from opd_lightning.teachers.base import CombinedScores, Composite, check_same_ids
from opd_lightning.teachers.reduced import reduced, written_ids
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of


@dataclass(frozen=True)
class MixedScores(CombinedScores):
    """Scores of several teachers on the same N tokens.

    Attributes:
        parts: each teacher's scores.
        weights: one for each part, with sum 1.
        space: "probability" averages probabilities, "log" log-probabilities, renormalised.
        ids [N]: the written tokens.
        kind: of the targets, "full" or "sampled".
        apart: the student's ids where a part has another tokenizer, so that the mixture is over what all share; else None.
    """

    parts: Sequence[Any]
    weights: Sequence[float]
    space: str
    ids: Tensor
    kind: Provides = "full"
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    apart: ValidIds | None = None

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
        return replace(self, parts=[part.take(index) for part in self.parts], ids=self.ids[index])

    def chunk(self, rows: slice, out: Tensor | None = None) -> FullLogits | SampledLogProbs | MixedCoarse:
        """The mixture's log-probabilities: [n, V], as logits, or those of the written tokens."""
        valid = self.valid if self.valid is None else self.valid[rows]
        if self.apart is not None:
            targets = [(part.chunk(rows).log_probs(1.0), valid_ids_of(part)) for part in self.parts]
            return mixture(targets, self.weights, self.apart, valid)
        mixed: Tensor | None = None
        absent: Tensor | None = None  # tokens without probability under some part, which a negative weight would make certain
        for part, weight in zip(self.parts, self.weights, strict=True):
            log_p = self.log_probs(part, rows)
            if self.space == "log":
                mixed = weight * log_p if mixed is None else mixed.add_(log_p, alpha=weight)
                absent = log_p == -torch.inf if absent is None else absent | (log_p == -torch.inf)
            else:
                scaled = log_p + torch.log(torch.tensor(weight, dtype=log_p.dtype))
                mixed = scaled if mixed is None else torch.logaddexp(mixed, scaled)
        assert mixed is not None
        if absent is not None and min(self.weights) < 0:
            mixed = mixed.masked_fill(absent, -torch.inf)
        return FullLogits(mixed, valid) if self.kind == "full" else SampledLogProbs(mixed, valid)

    def log_probs(self, part: Any, rows: slice) -> Tensor:
        """A part's log-probabilities of the rows: [n, V], or of the written tokens."""
        target, valid_ids = part.chunk(rows), self.valid_ids
        if self.kind == "sampled":
            ids = self.ids[rows]
            return reduced(target, "sampled", torch.where(valid_ids.contains(ids), ids, 0), None).sampled
        if valid_ids_of(part) != valid_ids:  # renormalised before mixing
            target = fitted(target, valid_ids_of(part), valid_ids, target.logits.dtype)
        return target.log_probs(1.0).log_p


class MixedTeacher(Composite):
    """A weighted average of the teachers' distributions, on every sample.

    Args:
        teachers: the teachers by name. Where not all provide the full vocabulary, the mixture of probabilities still has the
            written token's, and provides that alone.
        weights: positive weights by name, scaled to sum 1. None weighs all equally. In log space some may be negative, as long
            as the sum is positive: {good: 1.5, bad: -0.5} is proportional to good^1.5 / bad^0.5, the contrast of two readings.
        space: "probability" averages probabilities (a mixture of experts), "log" log-probabilities (a product of experts).

    Raises:
        ValueError: a weight is of no teacher or not positive, or the mixture does not follow from what the teachers provide.
    """

    def __init__(self, teachers: dict[str, Any], weights: dict[str, float] | None = None, space: str = "probability"):
        super().__init__(teachers)
        by_name = dict.fromkeys(teachers, 1.0) if weights is None else dict(weights)
        fits = all(weight > 0 or (space == "log" and weight != 0) for weight in by_name.values())
        if set(by_name) != set(teachers) or not fits or not sum(by_name.values()) > 0:
            raise ValueError(
                f"teacher.weights={by_name} must give each of {sorted(teachers)} a positive number; with teacher.space=log "
                "some may be negative, if the sum is not."
            )
        if space not in ("probability", "log"):
            raise ValueError(f"teacher.space={space!r} is unknown; choose probability or log.")
        less = [name for name, teacher in self.teachers.items() if "full" not in teacher.provides]
        if less and (space == "log" or "sampled" not in self.provides):
            raise ValueError(
                f"teacher=mixed with space={space} needs the whole vocabulary of each of its teachers, and "
                f"{', '.join(less)} give{'s' * (len(less) == 1)} less, from which no distribution of the mixture follows; "
                "choose other teachers, teacher=routed, or teacher.space=probability with teachers that give the written "
                "token's log-probability."
            )
        self.space = space
        self.kind: Provides = "sampled" if less else "full"
        if less:  # a token that is among the top k of one teacher only has no known probability in the mixture
            self.provides, self.top_k = frozenset({"sampled"}), None
        self.weights = {name: by_name[name] / sum(by_name.values()) for name in teachers}
        if self.apart:
            self.check_apart()

    def check_apart(self) -> None:
        """Check that a mixture with teachers that have other tokenizers is defined, and provide what it tells.

        Raises:
            ValueError: it is not.
        """
        aligned = [part for part in self.parts if part.apart]
        named = all(getattr(part.alignment, "names_tokens", True) for part in aligned)
        if self.space == "log" or self.kind != "full" or not named or len(self.parts) > len(self.teachers):
            raise ValueError(
                "teacher=mixed averages teachers with other tokenizers as probabilities of the tokens that all share, so each "
                "has to be a single teacher with teacher.alignment=shared and its whole vocabulary, in teacher.space="
                "probability; choose that, or teacher=routed."
            )
        self.provides = frozenset({"full", "topk"})
        self.fixed_temperature = True  # several tokens are one outcome, whose logits are not known

    def remade(self, teachers: dict[str, Any]) -> "MixedTeacher":
        """The same of other teachers."""
        return MixedTeacher(teachers, self.weights, self.space)

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> MixedScores:
        """The mixture of all teachers' scores of the samples."""
        parts = {name: teacher.score(samples, max_tokens) for name, teacher in self.teachers.items()}
        metrics = {f"{name}_{key}": values for name, part in parts.items() for key, values in part.metrics.items()}
        ids, found = written_ids(samples, self.student.lm.device), list(parts.values())
        if self.kind != "full":
            known = self.student.head.known
            check_same_ids([known.intersection([valid_ids_of(scores)]) for scores in found])
        apart = self.student.head.known if self.apart else None
        return MixedScores(found, list(self.weights.values()), self.space, ids, self.kind, metrics, apart)
