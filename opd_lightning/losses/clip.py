"""Clips: bounds on a divergence, for the few tokens where student and teacher are far apart. Off by default.

Each is called as clip(support, divergence, log_s, target, tokens) and returns the bounded divergence [n] and statistics [n].
"""

from typing import Any

import torch
from torch import Tensor

from opd_lightning.types import Tokens


def _check(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"loss.clip.limit={limit} must be positive.")


class ClipEntries:
    """min(entry, limit) for every entry of the vocabulary (OPSD, arXiv 2601.18734, limit 0.05 for forward KL).

    A clipped entry has no gradient, although the teacher disagrees most there. Entries of KLs may be negative, so the clipped
    sum is no divergence. Use it only where student and teacher are close.

    Args:
        limit: in nats.
    """

    def __init__(self, limit: float = 0.05):
        _check(limit)
        self.limit = limit

    def __call__(self, support, divergence, log_s: Tensor, target: Any, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped divergence, and the share of tokens with a clipped entry."""
        clipped: list[Tensor] = []

        def limited(log_s: Tensor, log_t: Tensor) -> Tensor:
            entries = divergence(log_s, log_t)
            clipped.append((entries.detach() > self.limit).any(-1))
            return entries.clamp(max=self.limit)

        value = support(limited, log_s, target, tokens)
        return value, {"entry_clip_fraction": clipped[0].to(value.dtype)}


class ClipPositions:
    """min(D, limit) for every position, by scaling: a clipped position keeps the direction of its gradient.

    Args:
        limit: in nats.
    """

    def __init__(self, limit: float = 2.0):
        _check(limit)
        self.limit = limit

    def __call__(self, support, divergence, log_s: Tensor, target: Any, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped divergence, and the share of clipped positions."""
        value = support(divergence, log_s, target, tokens)
        large = value.detach() > self.limit
        scale = torch.where(large, self.limit / value.detach(), 1.0)
        return value * scale, {"position_clip_fraction": large.to(value.dtype)}
