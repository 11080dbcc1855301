"""Divergences between the student's and the teacher's next-token distributions.

Each maps log-probabilities [n, V] to the *entries* [n, V] whose sum over V is the divergence of each token. Entries rather
than sums, so that supports, clips and the sampled-token estimate (see `vocab_support.py`) need no second formula. S is the
student, T the teacher. A token of probability zero on one side (log-probability -inf) contributes its limit.

All but `EntropyAware` and `Interpolated` are elementwise: entry v follows from log S_v and log T_v alone, which
`SampledToken` needs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.losses.schedules import Schedule, ends_of, value_at


class _PLogRatio(torch.autograd.Function):
    """p (log p - log q), with 0 (and gradient 0) where p is 0.

    Its derivatives are p (log p - log q + 1) and -p. With autograd, the case p = 0 would double the number of passes over the
    vocabulary.
    """

    @staticmethod
    def forward(ctx, log_p, log_q):
        p = log_p.exp()
        entries = torch.sub(log_p, log_q).mul_(p).masked_fill_(p == 0, 0.0)
        ctx.save_for_backward(p, entries)
        return entries

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        p, entries = ctx.saved_tensors
        on_p = torch.add(entries, p).mul_(grad) if ctx.needs_input_grad[0] else None
        on_q = torch.mul(p, grad).neg_() if ctx.needs_input_grad[1] else None
        return on_p, on_q


def _plogp_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _PLogRatio.apply(log_p, log_q)


class _JensenShannon(torch.autograd.Function):
    """beta T (log T - log M) + (1 - beta) S (log S - log M), with 0 where a probability is 0.

    The derivatives through M cancel, so the gradients are beta T (log T - log M) and (1 - beta) S (log S - log M).
    """

    @staticmethod
    def forward(ctx, log_s, log_t, beta):
        p_s, p_t = log_s.exp(), log_t.exp()
        over_s, over_t = _mixture_over(log_s, log_t, beta)
        part_s = over_s.mul_(p_s).mul_(beta - 1).masked_fill_(p_s == 0, 0.0)
        part_t = over_t.mul_(p_t).mul_(-beta).masked_fill_(p_t == 0, 0.0)
        ctx.save_for_backward(part_s, part_t)
        return part_s + part_t

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(
            part * grad if need else None for part, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ), None


def largest_ratio(dtype: torch.dtype) -> float:
    """The largest log-ratio of probabilities that expm1 takes; beyond it the smaller one is 0 beside the other."""
    return 0.98 * math.log(torch.finfo(dtype).max)


def _mixture_over(log_a: Tensor, log_b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log(M / A) and log(M / B) for M = (1 - share) A + share B; without meaning where A, or B, is 0.

    Each is found from the side that M is nearer to: log M - log A would lose the digits that a small share decides.
    """
    limit = largest_ratio(log_a.dtype)
    ratio = (log_b - log_a).clamp_(-limit, limit)
    if share <= 0.5:
        over_a = torch.expm1(ratio).mul_(share).log1p_()
        return over_a, over_a - ratio
    over_b = torch.expm1(-ratio).mul_(1 - share).log1p_()
    return over_b + ratio, over_b


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b); large and negative in place of -inf, for the gradient of logaddexp is NaN there."""
    one, other = log_a + math.log(share), log_b + math.log1p(-share)
    mixed = torch.logaddexp(one, other)
    if mixed.detach().amin() != -torch.inf:
        return mixed
    absent = mixed.detach() == -torch.inf
    return torch.logaddexp(one, other.masked_fill(absent, torch.finfo(mixed.dtype).min / 4))


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(T || S) = sum_v T (log T - log S): the student must cover the teacher (Hinton et al. 2015, arXiv 1503.02531).

    The direction of SFT and supervised distillation; with samples from the student, of SDFT and OPSD.
    """
    return _plogp_ratio(log_t, log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(S || T) = sum_v S (log S - log T): the student must stay where the teacher is (MiniLLM, arXiv 2306.08543)."""
    return _plogp_ratio(log_s, log_t)


def jsd(log_s: Tensor, log_t: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1).

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S.

    The expression tends to 0 at both ends, so beta = 0 and beta = 1 are *defined* as its rescaled limits KL(T || S) and
    KL(S || T): the scale of the loss jumps there, and learning rates do not carry over.

    Raises:
        ValueError: beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"loss.divergence.beta={beta} must lie in [0, 1]: 0 is forward KL, 1 is reverse KL.")
    if beta == 0.0:
        return forward_kl(log_s, log_t)
    if beta == 1.0:
        return reverse_kl(log_s, log_t)
    return _JensenShannon.apply(log_s, log_t, beta)


def skew_forward_kl(log_s: Tensor, log_t: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(T || alpha T + (1 - alpha) S): forward KL whose gradient stays bounded (DistiLLM, arXiv 2402.03898, eq. 3).

    alpha = 0 is forward KL.

    Raises:
        ValueError: alpha outside [0, 1).
    """
    _check_skew(alpha)
    return forward_kl(log_s, log_t) if alpha == 0.0 else _plogp_ratio(log_t, _mixture(log_t, log_s, alpha))


def skew_reverse_kl(log_s: Tensor, log_t: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(S || (1 - alpha) T + alpha S): reverse KL that is finite where T is 0 (DistiLLM, eq. 4).

    alpha = 0 is reverse KL.

    Raises:
        ValueError: alpha outside [0, 1).
    """
    _check_skew(alpha)
    return reverse_kl(log_s, log_t) if alpha == 0.0 else _plogp_ratio(log_s, _mixture(log_s, log_t, alpha))


def _check_skew(alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"loss.divergence.alpha={alpha} must lie in [0, 1); 0 is the plain KL, 0.1 is DistiLLM's.")


def total_variation(log_s: Tensor, log_t: Tensor) -> Tensor:
    """sum_v |S - T| / 2, in [0, 1]: bounded, and no token counts more than its probability (arXiv 2307.15190, section 3)."""
    return 0.5 * (log_s.exp() - log_t.exp()).abs()


class Interpolated:
    """A divergence from M, which is proportional to S^(1 - share) T^share with S held fixed (TAID, arXiv 2501.16937).

    TAID takes forward KL and raises the share from 0.4 to 1 (`schedules.Linear`): the target is never far from the student. Its
    adaptive speed, which reads the loss, is left out: a share here follows the step alone.

    Args:
        divergence: such as `forward_kl`.
        share: in [0, 1], a number or a schedule; 1 is the divergence from the teacher itself.

    Raises:
        ValueError: the share leaves [0, 1].
    """

    elementwise = False

    def __init__(self, divergence: Callable[[Tensor, Tensor], Tensor], share: float | Schedule = 0.5):
        if not all(0 <= end <= 1 for end in ends_of(share)):
            raise ValueError(f"loss.divergence.share={share} must lie in [0, 1]; 1 is the teacher itself.")
        self.divergence, self.share = divergence, share
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Take the share of an optimizer step."""
        self.now = value_at(self.share, step)

    def __call__(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """Entries [n, V]."""
        if self.now >= 1.0:
            return self.divergence(log_s, log_t)
        own = log_s.detach()
        mixed = own if self.now <= 0.0 else torch.log_softmax((1 - self.now) * own + self.now * log_t, -1)
        return self.divergence(log_s, mixed)


class EntropyAware:
    """Reverse KL, and forward KL on top where the teacher is uncertain (arXiv 2603.07079).

    Where many continuations are good, reverse KL alone concentrates the student on one of them.

    Args:
        threshold: nats of teacher entropy from which on a token counts as uncertain.
        forward: coefficient of the forward KL there.

    Raises:
        ValueError: an argument is negative.
    """

    elementwise = False

    def __init__(self, threshold: float = 1.0, forward: float = 1.0):
        for name, value in (("threshold", threshold), ("forward", forward)):
            if value < 0:
                raise ValueError(f"loss.divergence.{name}={value} must not be negative.")
        self.threshold, self.forward = threshold, forward

    def __call__(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """Entries [n, V]."""
        absent = torch.zeros_like(log_t)
        entropy = -torch.where(log_t == -torch.inf, absent, log_t.exp() * log_t).sum(-1, keepdim=True)
        if self.forward == 0.0:
            return reverse_kl(log_s, log_t)
        # Chosen, not multiplied: what does not count may be infinite.
        more = torch.where(entropy >= self.threshold, self.forward * forward_kl(log_s, log_t), 0.0)
        return reverse_kl(log_s, log_t) + more
