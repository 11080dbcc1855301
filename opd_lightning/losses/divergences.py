"""Divergences between the student's and the teacher's next-token distributions.

Each maps log-probabilities [n, V] to the *entries* [n, V] whose sum over V is the divergence of each token. Entries rather
than sums, so that supports, clips and the sampled-token estimate (see `vocab_support.py`) need no second formula. S is the
student, T the teacher. A token of probability zero on one side (log-probability -inf) contributes its limit.

All but `EntropyAware` are elementwise: entry v follows from log S_v and log T_v alone, which `SampledToken` needs.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        log_m = torch.mul(p_t, beta).add_(p_s, alpha=1 - beta).clamp_min_(torch.finfo(p_s.dtype).tiny).log_()
        part_t = torch.sub(log_t, log_m).mul_(p_t).mul_(beta).masked_fill_(p_t == 0, 0.0)
        part_s = torch.sub(log_s, log_m, out=log_m).mul_(p_s).mul_(1 - beta).masked_fill_(p_s == 0, 0.0)
        ctx.save_for_backward(part_s, part_t)
        return part_s + part_t

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(
            part * grad if need else None for part, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ), None


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


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
        uncertain = (entropy >= self.threshold).to(log_s.dtype)
        return reverse_kl(log_s, log_t) + self.forward * uncertain * forward_kl(log_s, log_t)
