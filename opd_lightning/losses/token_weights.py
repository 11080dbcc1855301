"""Token weights, and aggregates: what the batch loss is divided by.

A weight maps the batch's tokens to [N], given `tokens.weight` with 1 where a token may count and 0 where it may not. An
aggregate maps those weights, with the index of each token's sample and the number B of samples, to (weights [N], Z): the batch
loss is sum(weights x per-token loss) / Z, with Z summed over all devices *before* the first backward pass, so that gradients
depend neither on the micro-batch size nor on the number of devices.
"""

from torch import Tensor

from opd_lightning.types import Tokens


def completion_mask(tokens: Tokens) -> Tensor:
    """1 on every token of the completions that count, EOS included."""
    return tokens.weight


def skip_first(tokens: Tokens, n: int) -> Tensor:
    """The completion mask without the first `n` tokens, where a context leaks its phrasing (SDFT, arXiv 2601.19897).

    Raises:
        ValueError: `n` < 0.
    """
    if n < 0:
        raise ValueError(f"loss.weight.n={n} must be at least 0.")
    return tokens.weight * (tokens.position >= n)


def by_position(tokens: Tokens, first: int = 0, last: int | None = None, decay: float = 1.0) -> Tensor:
    """decay^t on token t (from 0) of the completions that count, and 0 before `first` and from `last` on.

    A decay below 1 favours the beginning, above 1 the end; `last` restricts the loss to prefixes (arXiv 2602.15260).

    Raises:
        ValueError: first < 0, last <= first, or decay not positive.
    """
    if first < 0 or (last is not None and last <= first):
        raise ValueError(f"loss.weight.first={first} and last={last} leave no position; take 0 <= first < last.")
    if not decay > 0:
        raise ValueError(f"loss.weight.decay={decay} must be positive; 1 weighs all positions alike.")
    inside = tokens.position >= first
    if last is not None:
        inside = inside & (tokens.position < last)
    return tokens.weight * inside * decay**tokens.position


def token_mean(weight: Tensor, sample: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Every token counts the same: Z is the sum of the weights [N]."""
    return weight, weight.sum()


def sequence_mean(weight: Tensor, sample: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Every completion counts the same, long or short: its weights are scaled to sum to 1, Z counts completions."""
    total = weight.new_zeros(samples).index_add_(0, sample, weight)
    return weight / total.clamp_min(1e-12)[sample], (total > 0).sum()


def constant(weight: Tensor, sample: Tensor, samples: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Z = B x `tokens`, independent of lengths: no length bias (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: `tokens` < 1.
    """
    if tokens < 1:
        raise ValueError(
            f"loss.aggregate.tokens={tokens} must be at least 1; rollout.sampling.max_new_tokens is the usual choice."
        )
    return weight, weight.new_tensor(samples * tokens)
