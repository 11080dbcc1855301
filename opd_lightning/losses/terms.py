"""Per-token losses beside divergences: cross-entropy and the clipped policy gradient, with the advantages it needs."""

from collections.abc import Callable

import torch
from torch import Tensor

from opd_lightning.types import Tokens


class CrossEntropy:
    """-log S(y): imitate the token that was written, whoever wrote it (SFT when the data did)."""

    def __call__(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log_s [n, V]. Returns the loss [n] and no statistics."""
        return -log_s.gather(-1, tokens.ids[:, None]).squeeze(-1), {}


class PolicyGradient:
    """-min(r A, clip(r, 1 - clip, 1 + clip_high) A) with r the ratio to the policy before the first update.

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with the group advantages of GRPO (arXiv 2402.03300).

    Args:
        advantage: maps rewards [P, G] (P prompts, G samples each) to advantages [P, G].
        clip: how far the ratio may fall, and rise unless `clip_high` is given.
        clip_high: how far the ratio may rise (DAPO's clip-higher, arXiv 2503.14476).
    """

    def __init__(self, advantage: Callable[[Tensor], Tensor], clip: float = 0.2, clip_high: float | None = None):
        if not 0 < clip < 1:
            raise ValueError(f"loss.policy_gradient.clip={clip} must lie between 0 and 1.")
        if clip_high is not None and not clip_high > 0:
            raise ValueError(f"loss.policy_gradient.clip_high={clip_high} must be positive; null takes clip.")
        self.advantage, self.clip, self.clip_high = advantage, clip, clip if clip_high is None else clip_high

    def __call__(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log_s [n, V]; `tokens.advantage` must be set. Returns the loss [n] and what the clip did."""
        assert tokens.advantage is not None, "a policy gradient needs advantages"
        logprob = log_s.gather(-1, tokens.ids[:, None]).squeeze(-1)
        old = logprob.detach() if tokens.old_logprob is None else tokens.old_logprob
        ratio = (logprob - old).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip_high)
        loss = -torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
        active = clipped * tokens.advantage < ratio * tokens.advantage
        return loss, {"ratio": ratio.detach(), "clip_fraction": active.to(loss.dtype)}


def group_relative(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-4) within each prompt's samples (GRPO); without the division: Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards [P, G]: G >= 2 samples of each of P prompts.
        scale_by_std: divide by the group's standard deviation (the unbiased one, as TRL and verl do).

    Returns:
        Advantages [P, G]; exactly zero in a group whose rewards are all equal.

    Raises:
        ValueError: G < 2, where a group has no baseline.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("rollout.samples_per_prompt=1 leaves a group advantage without a baseline; use 2 or more.")
    centred = rewards - rewards.mean(-1, keepdim=True)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    scale = rewards.std(-1, keepdim=True) + 1e-4 if scale_by_std else 1.0
    return torch.where(equal, 0.0, centred / scale)
