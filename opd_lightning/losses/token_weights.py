"""Which completion tokens count, and what the batch loss is divided by.

A weight maps a rollout to [B, T]; it is 0 outside the completions. An aggregate maps those weights to (weights, Z): the
batch loss is sum(weights x per-token loss) / Z, with Z summed over all devices *before* the first backward pass, so
that gradients depend neither on the micro-batch size nor on the number of devices.
"""

import torch
from torch import Tensor

from opd_lightning.types import Rollout


def completion_mask(rollout: Rollout) -> Tensor:
    """1 on every token of the completions that count, EOS included."""
    return (rollout.mask & rollout.counts[:, None]).float()


def skip_first(rollout: Rollout, n: int) -> Tensor:
    """The completion mask without the first `n` tokens, where a context leaks its phrasing (SDFT, arXiv 2601.19897).

    Raises:
        ValueError: `n` < 0.
    """
    if n < 0:
        raise ValueError(f"loss.weight.n={n} must be at least 0.")
    weight = completion_mask(rollout)
    weight[:, :n] = 0
    return weight


def by_position(rollout: Rollout, first: int = 0, last: int | None = None, decay: float = 1.0) -> Tensor:
    """decay^t on token t (from 0) of the completions that count, and 0 before `first` and from `last` on.

    A decay below 1 trusts the beginning, above 1 the end; `last` learns from prefixes only (arXiv 2602.15260).

    Raises:
        ValueError: first < 0, last <= first, or decay not positive.
    """
    if first < 0 or (last is not None and last <= first):
        raise ValueError(f"loss.weight.first={first} and last={last} leave no position; take 0 <= first < last.")
    if not decay > 0:
        raise ValueError(f"loss.weight.decay={decay} must be positive; 1 weighs all positions alike.")
    weight = completion_mask(rollout)
    position = torch.arange(weight.shape[1], device=weight.device)
    inside = (position >= first) & (position < (weight.shape[1] if last is None else last))
    return weight * inside * decay**position


def token_mean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every token counts the same: Z is the sum of the weights [B, T]."""
    return weight, weight.sum()


def sequence_mean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every completion counts the same, long or short: its weights [T] are scaled to sum to 1, Z counts completions."""
    total = weight.sum(1, keepdim=True)
    return weight / total.clamp_min(1e-12), (total > 0).sum()


def constant(weight: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Z = B x `tokens`, whatever was written: no length bias (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: `tokens` < 1.
    """
    if tokens < 1:
        raise ValueError(f"loss.aggregate.tokens={tokens} must be at least 1; rollout.max_new_tokens is the usual choice.")
    return weight, weight.new_tensor(weight.shape[0] * tokens)
