"""Targets: a teacher's outputs on each token: logits of the whole vocabulary, top k, or the written token's log-probability.

A `TeacherScores` stores N tokens compactly and gives targets chunk by chunk; a target becomes log-probabilities, on which the
vocabulary supports work. Combinations of targets and supports that do not fit are refused when a run is built.
`shared` are the ids that a target covers where the student has more (see `shared.py`); None where it covers all. Targets of
teachers with another vocabulary are in `aligned_targets.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.types import Cost
from opd_lightning.utils.vocabulary import ValidIds


def _rows(tensor: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if tensor is None else tensor[index]


def log_tail(log_p: Tensor, ids: Tensor, named: Tensor | None = None) -> Tensor:
    """Log of the probability [n, 1] outside of the tokens ids [n, k], -inf if there is none, from log-probabilities [n, V].

    Ids where `named` [n, k] is False stay outside; a row's ids all differ where it has any.
    """
    if named is None:
        return log_sum(log_p.scatter(-1, ids, -torch.inf))
    return log_sum(log_p.scatter(-1, ids, log_p.gather(-1, ids).masked_fill(named, -torch.inf)))


def log_sum(log_p: Tensor) -> Tensor:
    """Log of the summed probability [n, 1] of log-probabilities [n, V], -inf and without gradient where that is 0."""
    empty = log_p.detach().amax(-1, keepdim=True) == -torch.inf
    if not empty.any():
        return log_p.logsumexp(-1, keepdim=True)
    # The gradient of logsumexp over nothing is NaN, even where its value is not read.
    return torch.where(empty, -torch.inf, log_p.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True))


@dataclass(frozen=True)
class FullLogits:
    """Logits [n, V] of the whole vocabulary."""

    logits: Tensor
    valid: Tensor | None = None
    shared: ValidIds | None = None

    def take(self, index: Tensor | slice) -> "FullLogits":
        """The rows at an index."""
        return replace(self, logits=self.logits[index], valid=_rows(self.valid, index))

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "FullLogits":
        """The logits of the first ids of the vocabulary, in a dtype."""
        logits = self.logits.to(dtype)[:, :vocabulary]
        return replace(self, logits=logits if self.valid is None else torch.where(self.valid[:, None], logits, 0.0))

    def log_probs(self, temperature: float) -> "FullLogProbs":
        """Log-probabilities of the logits divided by a temperature."""
        logits = self.logits if temperature == 1.0 else self.logits / temperature
        return FullLogProbs(torch.log_softmax(logits, -1), self.valid, self.shared)


@dataclass(frozen=True)
class FullLogProbs:
    """Log-probabilities [n, V] of the whole vocabulary."""

    log_p: Tensor
    valid: Tensor | None = None
    shared: ValidIds | None = None

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of one token each, ids [n]."""
        return self.log_p.gather(-1, ids[:, None]).squeeze(-1)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable tokens: ids [n, k] and log-probabilities [n, k]."""
        top = self.log_p.topk(k, -1)
        return top.indices, top.values

    def truncated(self, k: int, ids: Tensor) -> Any:
        """The k most probable tokens and the written ones, ids [n], alone."""
        return TopKLogProbs(*self.top(k), self.of_tokens(ids), self.valid)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the student's tokens ids [n]; NaN where the target does not tell."""
        return self.of(ids)

    def at(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n, k] of the tokens ids [n, k]."""
        return self.log_p.gather(-1, ids)

    def log_tail(self, ids: Tensor) -> Tensor:
        """Log of the probability [n, 1] outside of the tokens ids [n, k]."""
        return log_tail(self.log_p, ids)


@dataclass(frozen=True)
class TopKLogProbs:
    """Log-probabilities from a server: the k most probable tokens, and the written token.

    Attributes:
        ids [n, k], logprobs [n, k]: the most probable first. A place with -inf names no token, whatever its id.
        sampled [n]: log-probability of the written token.
    """

    ids: Tensor
    logprobs: Tensor
    sampled: Tensor
    valid: Tensor | None = None
    shared: ValidIds | None = None

    def take(self, index: Tensor | slice) -> "TopKLogProbs":
        """The rows at an index."""
        ids, logprobs, sampled = self.ids[index], self.logprobs[index], self.sampled[index]
        return replace(self, ids=ids, logprobs=logprobs, sampled=sampled, valid=_rows(self.valid, index))

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "TopKLogProbs":
        """The log-probabilities in a dtype, with finite numbers at invalid rows; an id outside of the vocabulary is an error.

        Raises:
            ValueError: a token id is outside of the student's vocabulary.
        """
        ids, logprobs, sampled = self.ids, self.logprobs.to(dtype), self.sampled.to(dtype)
        if self.valid is not None:
            ids = torch.where(self.valid[:, None], ids, 0)
            logprobs = torch.where(self.valid[:, None], logprobs, -math.log(ids.shape[1] + 1))
            sampled = torch.where(self.valid, sampled, -1.0)
        if ids.numel() and int(ids.max()) >= vocabulary:
            raise ValueError(
                f"the teacher names the token {int(ids.max())}, and the student has {vocabulary} tokens; choose models of one "
                "family."
            )
        return replace(self, ids=ids, logprobs=logprobs, sampled=sampled)

    def log_probs(self, temperature: float) -> "TopKLogProbs":
        """The same log-probabilities.

        Raises:
            ValueError: a temperature other than 1, for which the whole vocabulary would be needed.
        """
        if temperature != 1.0:
            raise ValueError(
                f"loss.temperature={temperature} needs the teacher's whole vocabulary; this one gives the top k: use 1."
            )
        return self

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the written tokens."""
        return self.sampled

    @property
    def named(self) -> Tensor:
        """Whether each place [n, k] names a token."""
        return self.logprobs > -torch.inf

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k: ids [n, k] and log-probabilities [n, k].

        Raises:
            ValueError: k is more than there are.
        """
        if k > self.ids.shape[1]:
            raise ValueError(f"loss.vocab_support.k={k} exceeds the {self.ids.shape[1]} that the teacher gives; lower it.")
        return self.ids[:, :k], self.logprobs[:, :k]

    def truncated(self, k: int, ids: Tensor) -> "TopKLogProbs":
        """The first k, and the written tokens."""
        return TopKLogProbs(*self.top(k), self.sampled, self.valid)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the written tokens."""
        return self.sampled

    def log_tail(self, ids: Tensor) -> Tensor:
        """Log of the probability [n, 1] outside of the first k tokens, ids [n, k]."""
        inside = self.logprobs[:, : ids.shape[1]].exp().sum(-1, keepdim=True)
        return torch.log1p(-inside.clamp(max=1.0 - torch.finfo(inside.dtype).eps))


@dataclass(frozen=True)
class SampledLogProbs:
    """Log-probabilities [n] of the written tokens alone."""

    sampled: Tensor
    valid: Tensor | None = None
    shared: ValidIds | None = None

    def take(self, index: Tensor | slice) -> "SampledLogProbs":
        """The rows at an index."""
        return replace(self, sampled=self.sampled[index], valid=_rows(self.valid, index))

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> "SampledLogProbs":
        """The log-probabilities in a dtype, with a finite number at invalid rows."""
        sampled = self.sampled.to(dtype)
        return replace(self, sampled=sampled if self.valid is None else torch.where(self.valid, sampled, -1.0))

    def log_probs(self, temperature: float) -> "SampledLogProbs":
        """The same log-probabilities; raises ValueError for a temperature other than 1."""
        if temperature != 1.0:
            raise ValueError(
                f"loss.temperature={temperature} needs the teacher's whole vocabulary; this one gives a token: use 1."
            )
        return self

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the written tokens."""
        return self.sampled

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n] of the written tokens."""
        return self.sampled


@dataclass(frozen=True)
class HiddenScores:
    """Scores of a local model, kept as hidden states until a chunk of logits is needed.

    Attributes:
        hidden [N, H]: the hidden state that predicts each token; no gradient flows into it.
        project: maps hidden rows [n, H] to logits [n, V], into a buffer of that size if one is given.
        vocabulary: V.
        absent: ids below V that the model has no token for; their logits are -inf.
        valid [N], cost, metrics: see `TeacherScores`.
    """

    hidden: Tensor
    project: Callable[..., Tensor]
    vocabulary: int
    valid: Tensor | None = None
    cost: Cost = field(default_factory=Cost)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    absent: tuple[int, ...] = ()

    def take(self, index: Tensor | slice) -> "HiddenScores":
        """The rows at an index of the packed axis."""
        return replace(self, hidden=self.hidden[index], valid=_rows(self.valid, index))

    def chunk(self, rows: slice, out: Tensor | None = None) -> FullLogits:
        """Logits of the rows."""
        return FullLogits(self.project(self.hidden[rows], out), _rows(self.valid, rows))


@dataclass(frozen=True)
class TopKScores:
    """Scores from a server or from files: `target` holds all N tokens, of their most probable ones or of the written."""

    target: Any
    vocabulary: int
    cost: Cost = field(default_factory=Cost)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor | None:
        """Whether each token [N] has a target, or None."""
        return self.target.valid

    def take(self, index: Tensor | slice) -> "TopKScores":
        """The rows at an index of the packed axis."""
        return replace(self, target=self.target.take(index))

    def chunk(self, rows: slice, out: Tensor | None = None) -> Any:
        """The target of the rows."""
        return self.target.take(rows)
