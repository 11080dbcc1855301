"""Targets of several teachers at once, where these are compared with the student on outcomes of their own.

`JoinedTargets` has rows of several teachers; `mixture` is the average of several on the same rows. Some of these teachers have
another vocabulary, see `aligned_targets.py`; others are joined in `teachers.reduced`, and mixed in `teachers.mixed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_lightning.losses.aligned_targets import (
    CoarseLogits,
    CoarseLogProbs,
    CoarseTopK,
    SortedLogProbs,
    padded,
)
from opd_lightning.losses.outcomes import Classes, Outcomes
from opd_lightning.losses.shared import view
from opd_lightning.losses.targets import TopKLogProbs
from opd_lightning.types import Tokens
from opd_lightning.utils.vocabulary import ValidIds


@dataclass(frozen=True)
class JoinedLogProbs:
    """Log-probabilities of several teachers, each of some of n rows.

    Attributes:
        rows: the numbers of each teacher's rows.
        parts: each teacher's target of them, as log-probabilities.
        student: its ids.
        valid [n]: see `contracts.Target`.
    """

    rows: Sequence[Tensor]
    parts: Sequence[Any]
    student: ValidIds
    valid: Tensor | None = None

    def compared(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, Any, Tokens, Tensor | None]:
        """See `CoarseLogProbs.compared`; the outcomes of every row are its teacher's, and impossible ones behind them."""
        views = [
            view(log_s[rows], log_s[rows], target, tokens.take(rows))
            for rows, target in zip(self.rows, self.parts, strict=True)
        ]
        width = max(seen.log_s.shape[-1] for seen in views)
        coarse = self.ordered([padded(seen.log_s, width) for seen in views])
        log_p = self.ordered([padded(seen.target.log_p, width) for seen in views])
        log_mass = self.ordered(
            [seen.log_s.new_zeros(len(seen.log_s)) if seen.log_mass is None else seen.log_mass for seen in views]
        )
        valid = self.ordered(
            [
                torch.ones_like(rows, dtype=torch.bool) if seen.target.valid is None else seen.target.valid
                for rows, seen in zip(self.rows, views, strict=True)
            ]
        )
        names = ("ids", "old_logprob", "sampler_logprob")
        columns = {name: [getattr(seen.tokens, name) for seen in views] for name in names}
        moved: dict[str, Any] = {name: self.ordered(column) for name, column in columns.items() if column[0] is not None}
        if all(isinstance(seen.target, SortedLogProbs) for seen in views):
            return coarse, SortedLogProbs(log_p, valid), replace(tokens, **moved), None
        mass = [getattr(seen.target, "log_mass", seen.log_s.new_zeros(len(seen.log_s))) for seen in views]
        return coarse, CoarseLogProbs(log_p, valid, log_mass=self.ordered(mass)), replace(tokens, **moved), log_mass

    def ordered(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each teacher's rows in the order of all rows."""
        return torch.cat(list(values))[torch.cat(list(self.rows)).argsort()]

    def truncated(self, k: int, ids: Tensor) -> "JoinedTargets":
        """What each row's teacher finds most probable, k of its outcomes or tokens; see `FullLogProbs.truncated`."""
        parts = [target.truncated(k, ids[rows]) for rows, target in zip(self.rows, self.parts, strict=True)]
        masks = [(rows[:, None] == torch.arange(len(ids), device=ids.device)).any(0) for rows in self.rows]
        return JoinedTargets.of(list(zip(masks, parts, strict=True)), self.student, self.valid)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the student's tokens ids [n]; NaN where a row's teacher does not have them."""
        return self.ordered([target.of_tokens(ids[rows]) for rows, target in zip(self.rows, self.parts, strict=True)])


@dataclass(frozen=True)
class JoinedTargets:
    """Targets of several teachers, each of some of n rows.

    Attributes:
        parts: each teacher's target of its rows.
        part [n], row [n]: the index of each row's teacher, and its place among that teacher's rows.
        student: its ids.
        valid [n], shared: see `contracts.Target`.
    """

    parts: Sequence[Any]
    part: Tensor
    row: Tensor
    student: ValidIds
    valid: Tensor | None = None
    shared: None = None

    @classmethod
    def of(cls, targets: Sequence[tuple[Tensor, Any]], student: ValidIds, valid: Tensor | None) -> "JoinedTargets":
        """The join of targets, each with the rows [n] that are its own, as bools.

        Args:
            student: its ids.
        """
        part = torch.zeros_like(targets[0][0], dtype=torch.long)
        row = torch.zeros_like(part)
        for i, (rows, _) in enumerate(targets):
            part[rows], row[rows] = i, torch.arange(int(rows.sum()), device=part.device)
        parts = [by_identity(target, student) if isinstance(target, TopKLogProbs) else target for _, target in targets]
        return cls(parts, part, row, student, valid)

    def take(self, index: Tensor | slice) -> "JoinedTargets":
        """The rows at an index."""
        valid = None if self.valid is None else self.valid[index]
        return replace(self, part=self.part[index], row=self.row[index], valid=valid)

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "JoinedTargets":
        """The targets in a dtype."""
        return replace(self, parts=[target.narrow(vocabulary, dtype) for target in self.parts])

    def log_probs(self, temperature: float) -> JoinedLogProbs:
        """Each teacher's log-probabilities, of logits divided by a temperature."""
        rows = [(self.part == i).nonzero().flatten() for i in range(len(self.parts))]
        own = [(i, at) for i, at in enumerate(rows) if len(at)]
        targets = [self.parts[i].take(self.row[at]).log_probs(temperature) for i, at in own]
        return JoinedLogProbs([at for _, at in own], targets, self.student, self.valid)


@dataclass(frozen=True)
class MixedCoarse(CoarseLogits):
    """A mixture's log-probabilities of outcomes.

    Attributes:
        log_mass [n]: see `CoarseLogProbs`.
    """

    log_mass: Tensor = field(default_factory=lambda: torch.zeros(()))

    def take(self, index: Tensor | slice) -> "MixedCoarse":
        """The rows at an index."""
        valid = None if self.valid is None else self.valid[index]
        return replace(self, own_logits=self.own_logits[index], valid=valid, log_mass=self.log_mass[index])

    def log_probs(self, temperature: float) -> CoarseLogProbs:
        """Log-probabilities of the outcomes.

        Raises:
            ValueError: a temperature other than 1, for which every token of an outcome would have to be known.
        """
        if temperature != 1.0:
            raise ValueError(
                f"loss.temperature={temperature} cannot be applied to a mixture of teachers with other tokenizers, which "
                "counts several tokens as one outcome; use 1."
            )
        return replace(super().log_probs(temperature), log_mass=self.log_mass)


@lru_cache(maxsize=4)
def identity_of(student: ValidIds, device: torch.device) -> Outcomes:
    """The student's tokens as outcomes."""
    return Outcomes.identity(student.contains(torch.arange(student.size, device=device)))


def by_identity(target: TopKLogProbs, student: ValidIds) -> CoarseTopK:
    """A target of the student's own tokens as one of outcomes."""
    outcomes = identity_of(student, target.ids.device)
    return CoarseTopK(outcomes.student.outcome[target.ids], target.logprobs, outcomes, target.valid)


def mixture(
    targets: Sequence[tuple[Any, ValidIds]], weights: Sequence[float], student: ValidIds, valid: Tensor | None
) -> MixedCoarse:
    """The average of the teachers' probabilities of outcomes as fine as all of them allow.

    Tokens of the student's that one teacher counts together are together. What a teacher cannot write at all is no outcome.

    Args:
        targets: of each teacher, as log-probabilities over the student's tokens or over outcomes, and the ids that it has.
        weights: with sum 1.
        student: its ids.
    """
    device = targets[0][0].log_p.device
    found = [getattr(target, "outcomes", None) for target, _ in targets]
    own = [
        identity_of(student.intersection([known]), device) if outcomes is None else outcomes
        for outcomes, (_, known) in zip(found, targets, strict=True)
    ]
    outcomes, classes = joined_outcomes(tuple(own), student)
    terms, masses = [], []
    for (target, _), known, part, coarser, weight in zip(targets, found, own, classes, weights, strict=True):
        log_p = target.log_p if known is not None else part.student.log_probs(target.log_p)
        log_w = torch.log(torch.tensor(weight, dtype=log_p.dtype))
        terms.append(coarser.log_probs(log_p) + log_w)
        masses.append(log_w + (target.log_mass if known is not None else log_p.new_zeros(len(log_p))))
    return MixedCoarse(reduce(torch.logaddexp, terms), outcomes, valid, log_mass=reduce(torch.logaddexp, masses))


@lru_cache(maxsize=4)
def joined_outcomes(parts: tuple[Outcomes, ...], student: ValidIds) -> tuple[Outcomes, list[Classes]]:
    """The finest outcomes that several teachers' outcomes are parts of, and each teacher's outcomes as the tokens of these."""
    sides, device = [part.student for part in parts], parts[0].student.first.device
    ids = torch.arange(student.size, device=device)
    of = [pad(side.outcome, (0, student.size - len(side.outcome)), value=len(side)) for side in sides]
    label, before = ids, None
    while before is None or not torch.equal(label, before):  # the smallest id that is reached, step by step
        before = label
        for side, outcome in zip(sides, of, strict=True):
            least = torch.full((len(side) + 1,), student.size, device=device).scatter_reduce(0, outcome, label, "amin")
            label = torch.where(outcome < len(side), least[outcome], label)
    shared = torch.ones_like(ids, dtype=torch.bool)
    for part in parts:
        shared &= torch.zeros_like(shared).index_fill(0, part.student.first[part.shared], True)
    shared &= torch.bincount(label[shared], minlength=len(ids))[label] == 1  # the same for all teachers, and alone so
    masks = [torch.zeros_like(shared).index_fill(0, label[side.first], True) for side in sides]
    outcomes = Outcomes.of((label, ids), (student.contains(ids), torch.stack(masks).all(0)), (ids[shared], label[shared]))
    number = outcomes.teacher.outcome
    none, size = ids[:0], len(outcomes.student)
    classes = [Classes.of(number[label[side.first]], torch.ones_like(side.first) > 0, size, none) for side in sides]
    each = Classes.of(torch.arange(size, device=device), torch.ones(size, dtype=torch.bool, device=device), size, none)
    return Outcomes(outcomes.student, each, outcomes.shared), classes
