"""Returns: the divergence that a token leads to later in its completion, which the per-token loss leaves out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.types import Tokens


@dataclass(frozen=True)
class Returns:
    """The discounted sum of the divergences of a completion's later tokens, as a cost of this one.

    The gradient of the expected sum E_y[ sum_t D_t ] is E[ sum_t ( grad D_t + grad log S(y_t) sum_{u>t} D_u ) ]: the first part
    is the per-token loss, and this adds sg[ sum_{u>t} discount^(u-t) D_u ] log S(y_t). With discount 1 the sum is unbiased for
    the divergence of whole completions; for reverse KL this is MiniLLM's gradient with its single-step decomposition (arXiv
    2306.08543). loss/vocab_support=sampled takes log S(y) - log T(y) for D, which is the policy gradient of MiniLLM without
    it, and the discounted form of Thinking Machines.

    Args:
        discount: 0 is the per-token loss.
        length_normalized: divide by the number of later tokens, so that long completions are not punished (MiniLLM's length
            normalization).

    Raises:
        ValueError: the discount is outside [0, 1].
    """

    discount: float = 1.0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"loss.returns.discount={self.discount} must lie in [0, 1]; 1 is MiniLLM's, 0 leaves returns out.")

    def __call__(self, cost: Tensor, tokens: Tokens) -> Tensor:
        """The return [N] behind each token, from the divergences [N] of a batch whose samples are whole."""
        assert tokens.sample is not None
        rows, length = tokens.position, int(tokens.position.max()) + 1
        samples = int(tokens.sample.max()) + 1
        table = cost.new_zeros(samples, length)
        table[tokens.sample, rows] = cost
        behind = torch.zeros_like(table)
        for t in range(length - 2, -1, -1):
            behind[:, t] = self.discount * (table[:, t + 1] + behind[:, t + 1])
        value = behind[tokens.sample, rows]
        if not self.length_normalized:
            return value
        counts = torch.bincount(tokens.sample, minlength=samples)[tokens.sample]
        return value / (counts - 1 - rows).clamp_min(1)
