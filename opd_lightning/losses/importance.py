"""Importance ratios: of the policy to the older policy that sampled, and to the sampler's distribution."""

from torch import Tensor

from opd_lightning.types import Tokens


def update_ratio(logprob: Tensor, tokens: Tokens) -> Tensor:
    """S(y) / S_old(y) [n], S_old being the student before the first update on this rollout; differentiable.

    On the first update the value is 1, and the gradient that of log S(y).

    Args:
        logprob [n]: log S(y) now.
    """
    old = logprob.detach() if tokens.old_logprob is None else tokens.old_logprob
    return (logprob - old).exp()


def sampler_ratio(logprob: Tensor, tokens: Tokens, cap: float) -> Tensor:
    """min(S_old(y) / M(y), cap) [n], M being the distribution that y was drawn from; without gradient.

    Corrects for samplers that differ from the trainer: other kernels, another temperature, top-p (truncated importance
    sampling, Ionides 2008; for RL on language models, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"). 1 where the sampler's log-probabilities are not known.
    """
    old = logprob.detach() if tokens.old_logprob is None else tokens.old_logprob
    if tokens.sampler_logprob is None:
        return old.new_ones(old.shape)
    return (old - tokens.sampler_logprob).exp().clamp(max=cap)


def check_cap(place: str, cap: float | None) -> None:
    """Raises ValueError unless a cap is at least 1, or None."""
    if cap is not None and not cap >= 1:
        raise ValueError(f"{place}.importance_sampling_cap={cap} must be at least 1; 2.0 is usual, null leaves the ratio out.")
