"""Draws of some rows of a batch, equal to those that torch.multinomial makes of all of its rows."""

from functools import cache

import torch
from torch import Tensor

from opd_lightning.utils.seeds import seeded


def drawn(probs: Tensor, count: int, left: Tensor) -> Tensor:
    """A token of each row [B], as torch.multinomial draws it in a batch of `count` rows.

    multinomial takes the largest quotient of a probability and an exponentially distributed number, of which it draws one for
    each entry of the batch.

    Args:
        probs [B, V]: of the rows that are left; overwritten.
        left [B]: their places among all rows.
    """
    return probs.div_(exponentials(count, probs.shape[1], left)).argmax(-1)


def exponentials(count: int, width: int, rows: Tensor) -> Tensor:
    """Rows of [count, width] exponentially distributed numbers, from torch's current random state."""
    if rows.device.type != "cpu" or not by_logarithm():
        noise = torch.empty(count, width, dtype=torch.float32, device=rows.device).exponential_(1)
        return noise if len(rows) == count else noise[rows]
    uniform = torch.empty(count, width, dtype=torch.float64).uniform_()
    return inverse(uniform if len(rows) == count else uniform[rows])


def inverse(uniform: Tensor) -> Tensor:
    """Exponentially distributed numbers of uniform ones in float64, which are overwritten."""
    return uniform.neg_().log1p_().neg_().float()


@cache
def by_logarithm() -> bool:
    """Whether this build of torch makes exponential numbers on a CPU as `inverse` does; some draw them from another library."""
    with seeded(0):
        expected, after = torch.empty(64, 64, dtype=torch.float32).exponential_(1), torch.get_rng_state()
    with seeded(0):
        found, also = inverse(torch.empty(64, 64, dtype=torch.float64).uniform_()), torch.get_rng_state()
    return torch.equal(found, expected) and torch.equal(after, also)
