"""Advantages: how much better a completion is than expected.

Each function maps the rewards [P, G] of a whole batch, over all devices (P prompts, G samples of each), to advantages
[P, G] of the same shape. Where rewards are equal, advantages are exactly zero.
"""

import torch
from torch import Tensor


def reinforce(rewards: Tensor, baseline: bool = True) -> Tensor:
    """r - b, with b the mean reward of all *other* completions of the batch (REINFORCE, Williams 1992).

    A baseline without the completion itself leaves the gradient unbiased.

    Args:
        baseline: False takes b = 0.

    Raises:
        ValueError: baseline=True with a batch of one completion.
    """
    if not baseline:
        return rewards
    n = rewards.numel()
    if n < 2:
        raise ValueError(
            "data.batch_size=1 leaves REINFORCE without a baseline; use more, or loss.policy_gradient.advantage.baseline=false."
        )
    return _unless_equal(rewards.flatten(), (rewards - rewards.mean()).flatten() * n / (n - 1)).view_as(rewards)


def leave_one_out(rewards: Tensor) -> Tensor:
    """r - the mean reward of the prompt's *other* samples (RLOO, arXiv 2402.14740).

    Raises:
        ValueError: G < 2.
    """
    n = _group(rewards)
    return _unless_equal(rewards, (rewards - rewards.mean(-1, keepdim=True)) * n / (n - 1))


def group_relative(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-4) within each prompt's samples (GRPO, arXiv 2402.03300).

    Args:
        scale_by_std: divide by the group's standard deviation (the unbiased one, as TRL and verl do); without it the
            advantages are those of Dr. GRPO (arXiv 2503.20783), which does not favour prompts that are nearly always
            or nearly never solved.

    Raises:
        ValueError: G < 2.
    """
    _group(rewards)
    scale = rewards.std(-1, keepdim=True) + 1e-4 if scale_by_std else 1.0
    return _unless_equal(rewards, (rewards - rewards.mean(-1, keepdim=True)) / scale)


def _group(rewards: Tensor) -> int:
    """Samples per prompt."""
    n = rewards.shape[-1]
    if n < 2:
        raise ValueError(
            f"rollout.num_generations={n} leaves a group advantage without a baseline; use 2 or more "
            "(rollout=student_group has 8)."
        )
    return n


def _unless_equal(rewards: Tensor, advantages: Tensor) -> Tensor:
    """Exactly zero along the last axis where all its rewards are equal; rounding would leave a gradient there."""
    return torch.where((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0, advantages)
