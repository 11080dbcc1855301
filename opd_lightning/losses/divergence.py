"""Divergences between the student's and the teacher's next-token distributions.

Each function maps log-probabilities [n, V] to the *entries* [n, V] whose sum over V is the divergence of each token.
Entries rather than sums, so that supports, clips and the sampled-token estimate (see `support.py`) need no second
formula. S is the student, T the teacher. A token that one side gives probability zero (log-probability -inf)
contributes its limit.
"""

import torch
from torch import Tensor


def _plogp_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), with 0 (and gradient 0) where p is 0."""
    absent = log_p == -torch.inf
    log_p = log_p.masked_fill(absent, 0.0)
    return torch.where(absent, 0.0, log_p.exp() * (log_p - log_q))


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
    KL(S || T), as every library does: the scale of the loss jumps there, and learning rates do not carry over.

    Raises:
        ValueError: beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"loss.divergence.beta={beta} must lie in [0, 1]: 0 is forward KL, 1 is reverse KL.")
    if beta == 0.0:
        return forward_kl(log_s, log_t)
    if beta == 1.0:
        return reverse_kl(log_s, log_t)
    log_b, log_1b = torch.log(torch.tensor([beta, 1 - beta], dtype=log_s.dtype, device=log_s.device)).unbind()
    log_m = torch.logaddexp(log_t + log_b, log_s + log_1b)
    return beta * _plogp_ratio(log_t, log_m) + (1 - beta) * _plogp_ratio(log_s, log_m)
