"""Targets of teachers with another vocabulary: outcomes on which student and teacher can be compared.

A target keeps the teacher's logits over its own vocabulary until a block of log-probabilities is needed. `compared` puts the
student's log-probabilities on the target's outcomes (see `shared.view`), where any divergence can be taken.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.outcomes import Outcomes
from opd_lightning.losses.targets import FullLogProbs, TopKLogProbs, log_sum
from opd_lightning.types import Tokens


@dataclass(frozen=True)
class CoarseLogProbs(FullLogProbs):
    """Log-probabilities [n, K] of outcomes.

    Attributes:
        outcomes: what these are.
        log_mass [n]: log of the teacher's probability of the tokens that both have; NaN where it is not known.
    """

    outcomes: Any = None
    log_mass: Tensor = field(default_factory=lambda: torch.zeros(()))

    def compared(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, "CoarseLogProbs", Tokens, Tensor]:
        """The student's log-probabilities of the outcomes, this target, the tokens as outcomes, and log of the shared mass."""
        outcomes: Outcomes = self.outcomes
        coarse, written = outcomes.student.log_probs(log_s), outcomes.student.outcome[tokens.ids]
        log_mass = outcomes.log_shared(log_s, outcomes.student)
        if outcomes.student.whole:
            return coarse, self, moved(tokens, written, log_s, coarse), log_mass
        covered = written < len(outcomes.student)  # a token that the other cannot write is no outcome
        target = replace(self, valid=covered if self.valid is None else covered & self.valid)
        return coarse, target, moved(tokens, torch.where(covered, written, 0), log_s, coarse), log_mass

    def truncated(self, k: int, ids: Tensor) -> "CoarseTopK":
        """The k most probable outcomes alone; see `FullLogProbs.truncated`.

        Raises:
            ValueError: k is more than there are.
        """
        size = len(self.outcomes.student)
        if k > size:
            raise ValueError(f"k={k} exceeds the {size} outcomes on which student and teacher are compared; lower it.")
        top = self.log_p.topk(k, -1)
        return CoarseTopK(top.indices, top.values, self.outcomes, self.valid, self.log_mass)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the outcomes of the student's tokens ids [n]; NaN for those of none."""
        outcome = self.outcomes.student.outcome[ids]
        known = outcome < len(self.outcomes.student)
        return self.of(torch.where(known, outcome, 0)).masked_fill(~known, torch.nan)


@dataclass(frozen=True)
class CoarseLogits:
    """A teacher's logits [n, V] over its own vocabulary, to be compared on outcomes."""

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
        log_p, outcomes = log_softmax(self.own_logits, temperature), self.outcomes
        log_mass = outcomes.log_shared(log_p, outcomes.teacher)
        return CoarseLogProbs(outcomes.teacher.log_probs(log_p), self.valid, outcomes=outcomes, log_mass=log_mass)


@dataclass(frozen=True)
class CoarseTopKLogProbs(CoarseLogProbs):
    """Log-probabilities [n, k + 1] of those outcomes that a teacher lists, and of all others.

    Attributes:
        ids [n, k]: the outcomes; K in places without one, which have a log-probability of -inf. A row's others differ.
    """

    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def compared(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, "CoarseTopKLogProbs", Tokens, Tensor]:
        """See `CoarseLogProbs`; a place without an outcome has probability 0 on both sides."""
        every, target, moved_tokens, log_mass = super().compared(log_s, tokens)
        assert isinstance(target, CoarseTopKLogProbs)
        size = every.shape[-1]
        present = self.ids < size
        # An extra column takes the writes of places without an outcome.
        rest = torch.nn.functional.pad(every, (0, 1), value=-torch.inf).scatter(-1, self.ids, -torch.inf)
        chosen = every.gather(-1, self.ids.clamp(max=size - 1)).masked_fill(~present, -torch.inf)
        coarse = torch.cat([chosen, log_sum(rest)], -1)
        written = self.ids == moved_tokens.ids[:, None]
        ids = torch.where(written.any(-1), written.long().argmax(-1), self.ids.shape[1])
        return coarse, target, moved(moved_tokens, ids, every, coarse), log_mass


@dataclass(frozen=True)
class CoarseTopK:
    """The outcomes of a teacher's k most probable tokens, or its k most probable outcomes.

    Attributes:
        ids [n, k]: the outcomes, each as often as tokens of it are listed; K for tokens that belong to none.
        logprobs [n, k]: the teacher's, of the tokens; -inf in places without one.
        log_mass [n]: see `CoarseLogProbs`; None where it is not known.
    """

    ids: Tensor
    logprobs: Tensor
    outcomes: Outcomes
    valid: Tensor | None = None
    log_mass: Tensor | None = None
    shared: None = None

    def take(self, index: Tensor | slice) -> "CoarseTopK":
        """The rows at an index."""
        valid, log_mass = (None if x is None else x[index] for x in (self.valid, self.log_mass))
        return replace(self, ids=self.ids[index], logprobs=self.logprobs[index], valid=valid, log_mass=log_mass)

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "CoarseTopK":
        """The log-probabilities in a dtype, with finite numbers at invalid rows."""
        logprobs = self.logprobs.to(dtype)
        if self.valid is not None:
            logprobs = torch.where(self.valid[:, None], logprobs, -math.log(logprobs.shape[1] + 1))
        return replace(self, logprobs=logprobs)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k, by the student's tokens that stand for them: ids [n, k] and log-probabilities [n, k]."""
        return self.outcomes.student.first[self.ids[:, :k]], self.logprobs[:, :k]

    def log_probs(self, temperature: float) -> CoarseTopKLogProbs:
        """Log-probabilities of the outcomes; raises ValueError for a temperature other than 1."""
        ids, logprobs = gathered(self.ids, self.logprobs, len(self.outcomes.student))
        plain = TopKLogProbs(ids, logprobs, logprobs[:, 0]).log_probs(temperature)
        log_p = torch.cat([plain.logprobs, plain.log_tail(ids)], -1)
        mass = logprobs.new_full((len(ids),), torch.nan) if self.log_mass is None else self.log_mass.to(logprobs.dtype)
        return CoarseTopKLogProbs(log_p, self.valid, outcomes=self.outcomes, log_mass=mass, ids=ids)


def gathered(ids: Tensor, logprobs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Outcomes [n, k] of which none is named twice, and their log-probabilities without what belongs to no outcome.

    What is added to a place's outcome from later places leaves these empty (`size`, -inf). All is divided by the probability of
    what is not listed without an outcome, as on the other side.

    Args:
        ids, logprobs [n, k]: outcomes and log-probabilities; `size` names none.
    """
    named = (ids < size) & (logprobs > -torch.inf)
    same = (ids[:, :, None] == ids[:, None, :]) & named[:, :, None] & named[:, None, :]
    summed = log_sum(torch.where(same, logprobs[:, None, :], -torch.inf)).squeeze(-1)
    kept = named & (same.long().argmax(-1) == torch.arange(ids.shape[1], device=ids.device))
    one = same.sum(-1) == 1
    outside = logprobs.exp().masked_fill(ids < size, 0.0).sum(-1, keepdim=True)
    inside = torch.log1p(-outside.clamp(max=1.0 - torch.finfo(outside.dtype).eps))
    return ids.masked_fill(~kept, size), (torch.where(one, logprobs, summed) - inside).masked_fill(~kept, -torch.inf)


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
