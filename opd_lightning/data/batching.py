"""Micro-batches: how a whole-batch rollout is cut so that it fits in memory, without changing the gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor


def plan_micro_batches(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` padded tokens, longest rows first.

    Args:
        lengths: tokens per row, prompt and completion together.
        budget: rows x longest row may not exceed it; None keeps the whole batch together. A single row longer than the
            budget gets a micro-batch of its own.

    Returns:
        Lists of row indices; each row appears once.
    """
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    if budget is None:
        return [order]
    batches: list[list[int]] = []
    for b in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(b)
        else:
            batches.append([b])
    return batches


def packed_index(rows: Sequence[int], lengths: Tensor) -> Tensor:
    """Positions on the packed axis of the completion tokens of `rows`, in the order of `rows`.

    Args:
        lengths [B]: completion tokens per row of the whole batch, which is packed in row order.
    """
    ends = lengths.cumsum(0)
    starts = (ends - lengths).tolist()
    stops = ends.tolist()
    return torch.cat([torch.arange(starts[b], stops[b], device=lengths.device) for b in rows])
