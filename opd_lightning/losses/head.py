"""The head: applies any per-token loss to hidden states in chunks, so that [B, T, V] logits never exist.

The gradient with respect to hidden states and head weight is computed in the forward pass, while a chunk's logits are at
hand; backward only scales it. A custom function is needed because plain autograd would keep every chunk until backward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from opd_lightning.types import LogitSource, Tokens

TokenLoss = Callable[[Mapping[str, Tensor], Tokens], tuple[Tensor, dict[str, Tensor]]]
"""(logits by source, each [n, V]; the n tokens) -> (loss [n], statistics [n] by name)."""


@dataclass(frozen=True)
class Head:
    """The output layer of a language model.

    Attributes:
        weight [V, H], bias [V] or None.
        dtype: in which the product is computed; None takes autocast's when on, else that of the hidden states.
    """

    weight: Tensor
    bias: Tensor | None = None
    dtype: torch.dtype | None = None

    def copy(self) -> "Head":
        """The same layer with weights of its own."""
        return Head(self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone(), self.dtype)

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype of the matrix product for these hidden states."""
        if self.dtype is not None:
            return self.dtype
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden rows [n, H], in at least float32, without gradient."""
        dtype = self.compute_dtype(hidden)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return widen(F.linear(hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)))


def widen(logits: Tensor) -> Tensor:
    """To at least float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def head_loss(
    hidden: Tensor, head: Head, tokens: Tokens, sources: Mapping[str, LogitSource], loss: TokenLoss, chunk: int = 128
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(tokens.weight x loss) over N tokens, differentiable in the hidden states and the head.

    Args:
        hidden [N, H]: the student's hidden states that predict the tokens.
        head: the student's output layer.
        tokens: the N tokens with their weights.
        sources: the other distributions that `loss` reads, N rows each.
        chunk: rows whose logits exist at the same time. About 128 stays in a CPU's cache; larger suits a GPU.

    Returns:
        The weighted sum (a scalar) and the statistics [N] of every token, with "loss" among them.
    """
    if hidden.shape[0] == 0:
        return hidden.sum() + 0.0 * head.weight.sum(), {}
    stats: dict[str, Tensor] = {}
    # Statistics leave through a dict: as outputs of the autograd function they would be tracked as differentiable.
    total = _HeadLoss.apply(hidden, head.weight, head.bias, head.compute_dtype(hidden), tokens, sources, loss, chunk, stats)
    return total, stats


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, dtype, tokens, sources, loss, chunk, stats):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden, dtype=wide) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        total = hidden.new_zeros((), dtype=wide)
        parts: dict[str, list[Tensor]] = {}
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.detach().to(dtype)
            cast_bias = None if bias is None else bias.detach().to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                part, some = hidden[rows].detach().to(dtype), tokens.take(rows)
                with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                    raw = widen(F.linear(part, cast_weight, cast_bias)).requires_grad_(any(ctx.needs_input_grad))
                    logits = {"student": raw} | {k: s.project(s.hidden[rows]).to(wide) for k, s in sources.items()}
                    value, extra = loss(logits, some)
                    weighted = (some.weight.to(wide) * value).sum()
                total += weighted.detach()
                for name, column in (extra | {"loss": value.detach()}).items():
                    parts.setdefault(name, []).append(column)
                if any(ctx.needs_input_grad):
                    (slope,) = torch.autograd.grad(weighted, raw)
                    slope = slope.to(dtype)
                    if grad_hidden is not None:
                        grad_hidden[rows] = slope @ cast_weight
                    if grad_weight is not None:
                        _accumulate(grad_weight, slope, part)
                    if grad_bias is not None:
                        grad_bias += slope.sum(0)
        stats.update({name: torch.cat(columns) for name, columns in parts.items()})
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grads = [None if g is None else (g * grad_total).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*grads, None, None, None, None, None, None)


def _accumulate(grad_weight: Tensor, slope: Tensor, part: Tensor) -> None:
    """grad_weight += slope.T @ part, in place where the dtypes allow it."""
    if slope.dtype == grad_weight.dtype:
        grad_weight.addmm_(slope.T, part)
    else:
        grad_weight += slope.T @ part
