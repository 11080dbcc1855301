"""Vocabulary supports: over which tokens of the vocabulary a divergence is taken.

Each is called as support(divergence, log_s, target, tokens) with the student's log-probabilities [n, V] and the teacher's
target as log-probabilities (`targets.py`), and returns a loss [n]; a divergence maps log-probabilities of student and teacher
to entries of the same shape, see `divergences.py`. `requires` is what the teacher has to provide, `describe` gives statistics
[n] of the choice of tokens, by name.
"""

from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Provides
from opd_lightning.losses.importance import check_cap, sampler_ratio, update_ratio
from opd_lightning.losses.targets import FullLogProbs, TopKLogProbs, log_tail
from opd_lightning.types import Tokens


class FullVocabulary:
    """The exact divergence: the sum of its entries over the whole vocabulary."""

    needs_own_samples = False
    requires: Provides = "full"

    def __call__(self, divergence, log_s: Tensor, target: FullLogProbs, tokens: Tokens) -> Tensor:
        """Returns the divergence [n]."""
        return divergence(log_s, target.log_p).sum(-1)

    def describe(self, log_s: Tensor, target: Any) -> dict[str, Tensor]:
        """No statistics."""
        return {}


class TopK:
    """The divergence over the k most probable tokens of one side, and the remaining mass in one more.

    Dropping this mass would leave a gradient at S = T; so both sides either gather it in one more
    entry, the tail bucket (SDPO, arXiv 2601.20802), which bounds the exact divergence from below, or are renormalised
    to the k tokens (OPSD's option, arXiv 2601.18734), which ignores the mass outside.

    Args:
        k: tokens.
        of: whose most probable tokens, "teacher" or "student".
        tail_bucket: gather the remaining mass; False renormalises.

    Raises:
        ValueError: an argument is none of these, or k exceeds the vocabulary (when called).
    """

    needs_own_samples = False

    def __init__(self, k: int, of: str = "teacher", tail_bucket: bool = True):
        if k < 1:
            raise ValueError(f"loss.vocab_support.k={k} must be at least 1.")
        if of not in ("teacher", "student"):
            raise ValueError(f"loss.vocab_support.of={of!r} is unknown; choose teacher or student.")
        if not isinstance(tail_bucket, bool):
            raise ValueError(
                f"loss.vocab_support.tail_bucket={tail_bucket!r} is neither true nor false; false renormalises to the k tokens."
            )
        self.k, self.of, self.tail_bucket = k, of, tail_bucket

    @property
    def requires(self) -> Provides:
        """The teacher's top k; all of its vocabulary where the student chooses the tokens."""
        return "topk" if self.of == "teacher" else "full"

    def __call__(self, divergence, log_s: Tensor, target: Any, tokens: Tokens) -> Tensor:
        """Returns the divergence [n] over k tokens, or k and the tail."""
        vocabulary = log_s.shape[-1]
        if self.k > vocabulary:
            raise ValueError(
                f"loss.vocab_support.k={self.k} exceeds the {vocabulary} tokens that are compared; use loss/vocab_support=full."
            )
        if self.k == vocabulary and isinstance(target, FullLogProbs):
            return divergence(log_s, target.log_p).sum(-1)
        top, of_teacher = self.top(log_s, target)
        of_student, named = log_s.gather(-1, top), named_by(target, self.k)
        if named is not None:
            of_student = of_student.masked_fill(~named, -torch.inf)
        if not self.tail_bucket:
            return divergence(renormalised(of_student), renormalised(of_teacher)).sum(-1)
        tail = log_tail(log_s, top, named)
        return divergence(torch.cat([of_student, tail], -1), torch.cat([of_teacher, target.log_tail(top)], -1)).sum(-1)

    def top(self, log_s: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """The tokens [n, k], and the teacher's log-probabilities [n, k] of them."""
        if self.of == "teacher":
            return target.top(self.k)
        top = log_s.detach().topk(self.k, -1).indices
        return top, target.at(top)

    @torch.no_grad()
    def describe(self, log_s: Tensor, target: Any) -> dict[str, Tensor]:
        """Probability outside of the k tokens, of either side."""
        top, of_teacher = self.top(log_s, target)
        of_student, named = log_s.gather(-1, top), named_by(target, self.k)
        inside = {"student": of_student if named is None else of_student.masked_fill(~named, -torch.inf), "teacher": of_teacher}
        return {f"{name}_tail_mass": (1 - chosen.exp().sum(-1)).clamp_min(0.0) for name, chosen in inside.items()}


def named_by(target: Any, k: int) -> Tensor | None:
    """Whether each of the first k places [n, k] of a top-k target names a token; None for other targets."""
    return target.named[:, :k] if isinstance(target, TopKLogProbs) else None


def renormalised(log_p: Tensor) -> Tensor:
    """Log-probabilities [n, k] that sum to 1 in each row; uniform, without gradient, where all are -inf."""
    empty = log_p.detach().amax(-1, keepdim=True) == -torch.inf
    return log_p.masked_fill(empty, 0.0).log_softmax(-1)


class SampledToken:
    """The estimate from the sampled token alone, in policy-gradient form (Thinking Machines, "On-Policy Distillation").

    For any D = sum_v f(log S, log T) the gradient is E_{y~S}[ c(y) grad log S(y) ] with c = (df / dlog S) / S, so the
    per-token loss is sg[c(y)] log S(y). c is shifted to 0 at S = T, a constant baseline that keeps the gradient
    unbiased; for reverse KL this gives c = log S - log T, the usual negative advantage. From the second update on one
    rollout the tokens are samples of an older policy, which the importance ratio S / S_old corrects per token. The value
    of the loss is no estimate of the divergence; the logged KLs are.

    Args:
        importance_sampling_cap: multiply by min(policy / sampler, cap), see `importance.py`; None leaves it out.
        baseline: subtract E_{y~S}[c(y)] from c, over the whole vocabulary (vOPD, arXiv 2605.07865; for reverse KL it is
            KL(S || T)): unbiased, with less variance; needs the teacher's whole distribution.
        cost_limit: min(c, limit), in nats: a token that the teacher finds absurd costs no more (REOPOLD, arXiv 2603.11137,
            eq. 7, with limit log((1 - l) / l) for its l). It biases the estimate. None sets no limit.
        clip: no gradient where the importance ratio has fallen below 1 - clip and the token costs, or risen above 1 + clip_high
            and it gains: PPO's clipped surrogate with the advantage -c (arXiv 1707.06347, eq. 7). None never clips.
        clip_high: `clip` unless given.

    Raises:
        ValueError: a limit is not positive, or a clip outside (0, 1).
    """

    needs_own_samples = True

    def __init__(
        self,
        importance_sampling_cap: float | None = None,
        baseline: bool = False,
        cost_limit: float | None = None,
        clip: float | None = None,
        clip_high: float | None = None,
    ):
        check_cap("loss.vocab_support", importance_sampling_cap)
        if cost_limit is not None and not cost_limit > 0:
            raise ValueError(f"loss.vocab_support.cost_limit={cost_limit} must be positive; null sets no limit.")
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"loss.vocab_support.clip={clip} must lie between 0 and 1; null never clips.")
        if clip_high is not None and (clip is None or not clip_high > 0):
            raise ValueError(f"loss.vocab_support.clip_high={clip_high} must be positive and needs clip beside it.")
        self.importance_sampling_cap, self.baseline, self.cost_limit = importance_sampling_cap, baseline, cost_limit
        self.clip, self.clip_high = clip, clip if clip_high is None else clip_high

    @property
    def requires(self) -> Provides:
        """The written token's log-probability; all of the vocabulary for the baseline."""
        return "full" if self.baseline else "sampled"

    def __call__(self, divergence, log_s: Tensor, target: Any, tokens: Tokens) -> Tensor:
        """Returns the surrogate [n], whose gradient is the estimate's."""
        expected = self.expected_cost(divergence, log_s.detach(), target.log_p) if self.baseline else 0.0
        log_s, log_t = log_s.gather(-1, tokens.ids[:, None]).squeeze(-1), target.of(tokens.ids)
        cost = self.cost(divergence, log_s, log_t) - expected
        if self.cost_limit is not None:
            cost = cost.clamp(max=self.cost_limit)
        return self.ratio(cost, log_s, tokens) * cost * log_s

    def ratio(self, cost: Tensor, logprob: Tensor, tokens: Tokens) -> Tensor:
        """The importance ratio [n] of a token with this cost and log-probability, without gradient; 0 where it is clipped."""
        ratio = update_ratio(logprob, tokens).detach()
        if self.clip is not None:
            assert self.clip_high is not None
            done = ((ratio > 1 + self.clip_high) & (cost < 0)) | ((ratio < 1 - self.clip) & (cost > 0))
            ratio = torch.where(done, 0.0, ratio)
        if self.importance_sampling_cap is not None:
            ratio = ratio * sampler_ratio(logprob, tokens, self.importance_sampling_cap)
        return ratio

    def describe(self, log_s: Tensor, target: Any) -> dict[str, Tensor]:
        """No statistics."""
        return {}

    def cost(self, divergence, log_s: Tensor, log_t: Tensor) -> Tensor:
        """c, 0 at S = T, at log-probabilities of any shape."""
        return self.coefficient(divergence, log_s, log_t) - self.coefficient(divergence, log_s, log_s)

    def expected_cost(self, divergence, log_s: Tensor, log_t: Tensor) -> Tensor:
        """E_{y~S}[c(y)] [n] from log-probabilities [n, V]."""
        p = log_s.exp()
        return torch.where(p == 0, 0.0, p * self.cost(divergence, log_s, log_t)).sum(-1)

    @staticmethod
    def coefficient(divergence, log_s: Tensor, log_t: Tensor) -> Tensor:
        """(df / dlog S) / S at the given log-probabilities [n], by differentiating the divergence's entries."""
        with torch.enable_grad():
            leaf = log_s.detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(divergence(leaf, log_t.detach()).sum(), leaf)
        return grad / leaf.detach().exp()


class TopKSampledTail(TopK):
    """The exact gradient on k tokens, and the sampled token's estimate for all others.

    With c as in `SampledToken`, the gradient of any D is sum_v S(v) c(v) grad log S(v). The k tokens of one side are summed,
    and y ~ S stands for the rest: sum_{v in K} sg[S(v) c(v)] log S(v) + 1[y not in K] sg[c(y)] log S(y). Unbiased for every k,
    with less variance than the sampled token alone, and no gradient at S = T; of="teacher" needs no more than a server gives.

    Args:
        k: tokens.
        of: whose most probable tokens, "student" or "teacher".
        importance_sampling_cap: of the sampled token, as for `SampledToken`.

    Raises:
        ValueError: as `TopK`.
    """

    needs_own_samples = True

    def __init__(self, k: int, of: str = "student", importance_sampling_cap: float | None = None):
        super().__init__(k, of)
        self.sampled = SampledToken(importance_sampling_cap)

    def __call__(self, divergence, log_s: Tensor, target: Any, tokens: Tokens) -> Tensor:
        """Returns the surrogate [n], whose gradient is the estimate's."""
        if self.k > log_s.shape[-1]:
            raise ValueError(f"loss.vocab_support.k={self.k} exceeds the {log_s.shape[-1]} tokens that are compared; lower it.")
        top, of_teacher = self.top(log_s, target)
        of_student = log_s.gather(-1, top)
        named = named_by(target, self.k)
        named = torch.ones_like(top, dtype=torch.bool) if named is None else named
        known = named & (of_student.detach() > -torch.inf)
        costs = self.sampled.cost(divergence, of_student.detach(), of_teacher).masked_fill(~known, 0.0)
        exact = (of_student.detach().exp() * costs * of_student.masked_fill(~known, 0.0)).sum(-1)
        outside = ((top != tokens.ids[:, None]) | ~named).all(-1)
        return exact + torch.where(outside, self.sampled(divergence, log_s, target, tokens), 0.0)
