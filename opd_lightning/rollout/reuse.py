"""What every rollout has in common: how often it is used, and what becomes of completions that were cut off."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

NOBODY: Mapping[str, Any] = MappingProxyType({})
"""The scorers of a rollout that asks none."""


def check_reuse(updates_per_rollout: int, truncated: str) -> None:
    """Raises ValueError for values that no rollout takes."""
    if updates_per_rollout < 1:
        raise ValueError(f"rollout.updates_per_rollout={updates_per_rollout} must be at least 1.")
    if truncated not in ("keep", "mask"):
        raise ValueError(f"rollout.truncated={truncated!r} is unknown; choose keep or mask.")


def counted(cut: Tensor, truncated: str) -> Tensor:
    """Which completions [B] enter the loss, from which were cut off [B] and `truncated` ("keep" or "mask")."""
    return ~cut if truncated == "mask" else torch.ones_like(cut)
