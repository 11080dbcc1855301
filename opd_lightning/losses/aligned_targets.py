"""Targets of teachers with another vocabulary: outcomes on which student and teacher can be compared.

A target keeps the teacher's logits over its own vocabulary until a block of log-probabilities is needed. `compared` puts the
student's log-probabilities on the target's outcomes (see `shared.view`), where any divergence can be taken.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.targets import FullLogProbs, TopKLogProbs, log_sum
from opd_lightning.types import Tokens


@dataclass(frozen=True)
class Outcomes:
    """The tokens that two vocabularies share, and all others as one outcome more.

    Such a bucket exists if both have other tokens. If only one has, its distribution is renormalised over the shared tokens:
    the other could never reach the bucket, and their KL would be infinite.

    Attributes:
        student_ids, teacher_ids [K]: the same tokens.
        student_rest, teacher_rest: the ids of all others.
        outcome [V]: of each of the student's ids; K where it is not shared.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    outcome: Tensor

    @classmethod
    def of(cls, student_ids: Tensor, teacher_ids: Tensor, student: Tensor, teacher: Tensor) -> "Outcomes":
        """The outcomes of shared tokens [K].

        Args:
            student, teacher: which ids [V] are tokens; pairs with another one are left out.
        """
        inside = (student_ids < len(student)) & (teacher_ids < len(teacher))
        student_ids, teacher_ids = student_ids[inside], teacher_ids[inside]
        valid = student[student_ids] & teacher[teacher_ids]
        student_ids, teacher_ids = student_ids[valid], teacher_ids[valid]
        outcome = torch.full((len(student),), len(student_ids), device=student.device)
        outcome[student_ids] = torch.arange(len(student_ids), device=student.device)
        student_rest = student.index_fill(0, student_ids, False).nonzero().flatten()
        teacher_rest = teacher.index_fill(0, teacher_ids, False).nonzero().flatten()
        return cls(student_ids, teacher_ids, student_rest, teacher_rest, outcome)

    @property
    def bucket(self) -> bool:
        """Whether both have tokens that are not shared."""
        return bool(len(self.student_rest) and len(self.teacher_rest))

    def coarsened(self, log_p: Tensor, ids: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, K or K + 1] of the outcomes from those of all tokens, and log of the shared mass [n]."""
        if not len(rest) and len(ids) == log_p.shape[-1] and torch.equal(ids, torch.arange(len(ids), device=ids.device)):
            return log_p, log_p.new_zeros(len(log_p))
        chosen = log_p.index_select(-1, ids)
        log_mass = log_sum(chosen.detach()).squeeze(-1)
        if self.bucket:
            return torch.cat([chosen, log_sum(log_p.index_select(-1, rest))], -1), log_mass
        return chosen.log_softmax(-1) if len(rest) else chosen, log_mass


@dataclass(frozen=True)
class CoarseLogProbs(FullLogProbs):
    """Log-probabilities [n, K + 1] of shared tokens and of the rest.

    Attributes:
        outcomes: what these are.
        log_mass [n]: log of the teacher's probability of the shared tokens.
    """

    outcomes: Any = None
    log_mass: Tensor = field(default_factory=lambda: torch.zeros(()))

    def compared(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, "CoarseLogProbs", Tokens, Tensor]:
        """The student's log-probabilities of the outcomes, this target, the tokens as outcomes, and log of the shared mass."""
        outcomes = self.outcomes
        coarse, log_mass = outcomes.coarsened(log_s, outcomes.student_ids, outcomes.student_rest)
        ids, target = outcomes.outcome[tokens.ids], self
        if not outcomes.bucket:  # a token that the other lacks is no outcome
            covered = ids < coarse.shape[-1]
            ids = torch.where(covered, ids, 0)
            target = replace(self, valid=covered if self.valid is None else covered & self.valid)
        return coarse, target, moved(tokens, ids, log_s, coarse), log_mass

    def top_tokens(self, k: int) -> tuple[Tensor, Tensor]:
        """The most probable shared tokens: the student's ids [n, k] and log-probabilities [n, k].

        Raises:
            ValueError: k is more than there are.
        """
        ids: Tensor = self.outcomes.student_ids
        if k > len(ids):
            raise ValueError(f"k={k} exceeds the {len(ids)} tokens that student and teacher share; lower it.")
        top = self.log_p[:, : len(ids)].topk(k, -1)
        return ids[top.indices], top.values

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the student's tokens ids [n]; NaN for those that are not shared."""
        outcome: Tensor = self.outcomes.outcome[ids]
        shared = outcome < len(self.outcomes.student_ids)
        return self.of(torch.where(shared, outcome, 0)).masked_fill(~shared, torch.nan)


@dataclass(frozen=True)
class CoarseLogits:
    """A teacher's logits [n, V] over its own vocabulary, to be compared on shared tokens."""

    own_logits: Tensor
    outcomes: Outcomes
    valid: Tensor | None = None
    shared: None = None

    def take(self, index: Tensor | slice) -> "CoarseLogits":
        """The rows at an index."""
        return replace(self, own_logits=self.own_logits[index], valid=None if self.valid is None else self.valid[index])

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "CoarseLogits":
        """The logits in a dtype, with finite numbers at invalid rows; they keep the teacher's vocabulary."""
        return replace(self, own_logits=finite(self.own_logits.to(dtype), self.valid))

    def log_probs(self, temperature: float) -> CoarseLogProbs:
        """Log-probabilities of the outcomes, of logits divided by a temperature."""
        log_p = log_softmax(self.own_logits, temperature)
        log_p, log_mass = self.outcomes.coarsened(log_p, self.outcomes.teacher_ids, self.outcomes.teacher_rest)
        return CoarseLogProbs(log_p, self.valid, outcomes=self.outcomes, log_mass=log_mass)


@dataclass(frozen=True)
class CoarseTopKLogProbs(CoarseLogProbs):
    """Log-probabilities [n, k + 1] of those of a teacher's k most probable tokens that are shared, and of the rest.

    Attributes:
        ids [n, k]: the student's; those that it does not have, with a log-probability of -inf, are `size` or more.
        size: V, of the student.
    """

    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    size: int = 0

    def compared(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, "CoarseTopKLogProbs", Tokens, Tensor]:
        """See `CoarseLogProbs`; a slot without a shared token has probability 0 on both sides."""
        present = self.ids < self.size
        # An extra column takes the writes of ids that the student does not have.
        rest = torch.nn.functional.pad(log_s, (0, 1), value=-torch.inf).scatter(-1, self.ids.clamp(max=self.size), -torch.inf)
        chosen = log_s.gather(-1, self.ids.clamp(max=self.size - 1)).masked_fill(~present, -torch.inf)
        coarse = torch.cat([chosen, log_sum(rest)], -1)
        written = self.ids == tokens.ids[:, None]
        ids = torch.where(written.any(-1), written.long().argmax(-1), self.ids.shape[1])
        return coarse, self, moved(tokens, ids, log_s, coarse), log_sum(chosen.detach()).squeeze(-1)


@dataclass(frozen=True)
class CoarseTopK:
    """A teacher's k most probable tokens, by the student's ids, to be compared on those that are shared.

    Attributes:
        ids [n, k]: `size` or more for those that the student does not have.
        logprobs [n, k]: the teacher's.
        size: V, of the student.
    """

    ids: Tensor
    logprobs: Tensor
    size: int
    valid: Tensor | None = None
    shared: None = None

    def take(self, index: Tensor | slice) -> "CoarseTopK":
        """The rows at an index."""
        valid = None if self.valid is None else self.valid[index]
        return replace(self, ids=self.ids[index], logprobs=self.logprobs[index], valid=valid)

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "CoarseTopK":
        """The log-probabilities in a dtype, with finite numbers at invalid rows."""
        logprobs = self.logprobs.to(dtype)
        if self.valid is not None:
            logprobs = torch.where(self.valid[:, None], logprobs, -math.log(logprobs.shape[1] + 1))
        return replace(self, logprobs=logprobs)

    def log_probs(self, temperature: float) -> CoarseTopKLogProbs:
        """Log-probabilities of the outcomes; raises ValueError for a temperature other than 1."""
        plain = TopKLogProbs(self.ids, self.logprobs.masked_fill(self.ids >= self.size, -torch.inf), self.logprobs[:, 0])
        plain = plain.log_probs(temperature)
        log_p = torch.cat([plain.logprobs, plain.log_tail(self.ids)], -1)
        log_mass = log_sum(plain.logprobs).squeeze(-1)
        return CoarseTopKLogProbs(log_p, self.valid, log_mass=log_mass, ids=self.ids, size=self.size)


@dataclass(frozen=True)
class SortedLogProbs(FullLogProbs):
    """Log-probabilities [n, W] in falling order, whichever tokens they are of; -inf behind the end of a vocabulary."""

    def compared(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, "SortedLogProbs", Tokens, None]:
        """The student's log-probabilities in falling order, this target, and the tokens by their rank."""
        width = max(log_s.shape[-1], self.log_p.shape[-1])
        ranked = padded(log_s.sort(-1, descending=True).values, width)
        written = log_s.detach().gather(-1, tokens.ids[:, None])
        rank = (log_s.detach() > written).sum(-1)
        target = replace(self, log_p=padded(self.log_p, width))
        return ranked, target, moved(tokens, rank, log_s, ranked), None


@dataclass(frozen=True)
class SortedLogits:
    """A teacher's logits [n, V] over its own vocabulary, to be compared by rank."""

    own_logits: Tensor
    valid: Tensor | None = None
    shared: None = None

    def take(self, index: Tensor | slice) -> "SortedLogits":
        """The rows at an index."""
        return replace(self, own_logits=self.own_logits[index], valid=None if self.valid is None else self.valid[index])

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "SortedLogits":
        """The logits in a dtype, with finite numbers at invalid rows; they keep the teacher's vocabulary."""
        return replace(self, own_logits=finite(self.own_logits.to(dtype), self.valid))

    def log_probs(self, temperature: float) -> SortedLogProbs:
        """Log-probabilities in falling order, of logits divided by a temperature."""
        return SortedLogProbs(log_softmax(self.own_logits, temperature).sort(-1, descending=True).values, self.valid)


def moved(tokens: Tokens, ids: Tensor, log_s: Tensor, log_outcomes: Tensor) -> Tokens:
    """The tokens with other ids [n], and old log-probabilities such that their ratios to new ones stay as they are."""
    old, new = (x.detach().gather(-1, i[:, None]).squeeze(-1) for x, i in ((log_s, tokens.ids), (log_outcomes, ids)))
    before, sampler = (None if x is None else x + (new - old) for x in (tokens.old_logprob, tokens.sampler_logprob))
    return replace(tokens, ids=ids, old_logprob=before, sampler_logprob=sampler)


def finite(logits: Tensor, valid: Tensor | None) -> Tensor:
    """The logits, 0 at invalid rows."""
    return logits if valid is None else torch.where(valid[:, None], logits, 0.0)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of logits divided by a temperature."""
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def padded(log_p: Tensor, width: int) -> Tensor:
    """Log-probabilities with -inf behind them."""
    return torch.nn.functional.pad(log_p, (0, width - log_p.shape[-1]), value=-torch.inf)
