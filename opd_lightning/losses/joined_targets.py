"""Targets of several teachers at once, where these are compared with the student on outcomes of their own.

`JoinedTargets` has rows of several teachers; `mixture` is the average of several on the same rows. Some of these teachers have
another vocabulary, see `aligned_targets.py`; others are joined in `teachers.reduced`, and mixed in `teachers.mixed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.aligned_targets import (
    CoarseLogits,
    CoarseLogProbs,
    CoarseTopK,
    Outcomes,
    SortedLogProbs,
    padded,
)
from opd_lightning.losses.shared import view
from opd_lightning.losses.targets import TopKLogProbs, log_sum
from opd_lightning.types import Tokens
from opd_lightning.utils.vocabulary import ValidIds


@dataclass(frozen=True)
class JoinedLogProbs:
    """Log-probabilities of several teachers, each of some of n rows.

    Attributes:
        rows: the numbers of each teacher's rows.
        parts: each teacher's target of them, as log-probabilities.
        valid [n]: see `contracts.Target`.
    """

    rows: Sequence[Tensor]
    parts: Sequence[Any]
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

    def top_tokens(self, k: int) -> tuple[Tensor, Tensor]:
        """The student's k tokens that each row's teacher finds most probable: ids [n, k] and log-probabilities [n, k]."""
        found = [target.top_tokens(k) for target in self.parts]
        return self.ordered([ids for ids, _ in found]), self.ordered([logprobs for _, logprobs in found])

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the student's tokens ids [n]; NaN where a row's teacher does not have them."""
        return self.ordered([target.of_tokens(ids[rows]) for rows, target in zip(self.rows, self.parts, strict=True)])


@dataclass(frozen=True)
class JoinedTargets:
    """Targets of several teachers, each of some of n rows.

    Attributes:
        parts: each teacher's target of its rows.
        part [n], row [n]: the index of each row's teacher, and its place among that teacher's rows.
        valid [n], shared: see `contracts.Target`.
    """

    parts: Sequence[Any]
    part: Tensor
    row: Tensor
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
        parts = [
            CoarseTopK(target.ids, target.logprobs, student.size, target.valid) if isinstance(target, TopKLogProbs) else target
            for _, target in targets
        ]
        return cls(parts, part, row, valid)

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
        return JoinedLogProbs([at for _, at in own], targets, self.valid)


@dataclass(frozen=True)
class MixedCoarse(CoarseLogits):
    """A mixture's log-probabilities of the tokens that all of its teachers share with the student, and of the rest."""

    def log_probs(self, temperature: float) -> CoarseLogProbs:
        """Log-probabilities of the outcomes.

        Raises:
            ValueError: a temperature other than 1, at which the rest would have to be known token by token.
        """
        if temperature != 1.0:
            raise ValueError(
                f"loss.temperature={temperature} cannot be applied to a mixture of teachers with other tokenizers, whose "
                "other tokens are one outcome; use 1."
            )
        return super().log_probs(temperature)


def mixture(
    targets: Sequence[tuple[Any, ValidIds]], weights: Sequence[float], student: ValidIds, valid: Tensor | None
) -> MixedCoarse:
    """The average of the teachers' probabilities of the tokens that all of them share with the student, and of all others.

    With the outcomes of `Outcomes`, the average of coarsened distributions is the coarsened average.

    Args:
        targets: of each teacher, as log-probabilities over the student's tokens or over outcomes, and the ids that it has.
        weights: with sum 1.
        student: its ids.
    """
    device = targets[0][0].log_p.device
    every = torch.arange(student.size, device=device)
    ids = every[student.contains(every)]
    for target, known in targets:
        outcomes = getattr(target, "outcomes", None)
        ids = ids[known.contains(ids) if outcomes is None else torch.isin(ids, outcomes.student_ids)]
    rest = any(target.log_p.shape[-1] > len(ids) for target, _ in targets)
    mixed: Tensor | None = None
    for (target, _), weight in zip(targets, weights, strict=True):
        outcomes = getattr(target, "outcomes", None)
        own = ids if outcomes is None else outcomes.outcome[ids]
        log_p = target.log_p.index_select(-1, own)
        if rest:
            log_p = torch.cat([log_p, log_sum(target.log_p.index_fill(-1, own, -torch.inf))], -1)
        scaled = log_p + torch.log(torch.tensor(weight, dtype=log_p.dtype))
        mixed = scaled if mixed is None else torch.logaddexp(mixed, scaled)
    assert mixed is not None
    teacher = torch.ones(mixed.shape[-1], dtype=torch.bool, device=device)
    outcomes = Outcomes.of(ids, torch.arange(len(ids), device=device), student.contains(every), teacher)
    return MixedCoarse(mixed, outcomes, valid)
