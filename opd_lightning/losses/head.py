"""The head: applies any per-token loss to hidden states in chunks, so that [B, T, V] logits never exist.

The gradient with respect to hidden states and head weight is computed in the forward pass, while a chunk's logits
exist; backward only scales it. A custom function is needed because plain autograd would keep every chunk until backward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.contracts import TeacherScores
from opd_lightning.losses.closed_form import Scratch
from opd_lightning.losses.not_finite import NotFinite, reason
from opd_lightning.types import Tokens
from opd_lightning.utils.products import product as product_by_onednn
from opd_lightning.utils.products import suits
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of

BLOCK = 8 * 2**20
"""Bytes of logits that a CPU processes at a time; larger temporaries are allocated anew at every use."""


class TokenLoss(Protocol):
    """A loss per token of the student's logits [n, V], targets by name and n tokens: (loss [n], statistics [n] by name)."""

    def __call__(self, logits: Tensor, targets: Mapping[str, Any], tokens: Tokens, /) -> tuple[Tensor, dict[str, Tensor]]: ...


SPARSE = 8
"""One token in so many is looked at for the mass on padding: a mean to watch, which is to cost nothing."""


@dataclass(frozen=True)
class Head:
    """The output layer of a language model, with the scale and cap of its logits.

    Attributes:
        weight [V, H], bias [V] or None.
        dtype: in which the product is computed; None takes autocast's when on, else that of the hidden states.
        scale: multiplies the product (Granite, Cohere).
        softcap: c in c tanh(logits / c), behind the scale (Gemma); None caps nothing.
        valid_ids: the rows that are tokens; None takes all. Logits are those of the first `valid_ids.size` rows, -inf where one
            is absent. The weight stays whole, padding has a gradient of zero.
    """

    weight: Tensor
    bias: Tensor | None = None
    dtype: torch.dtype | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_ids: ValidIds | None = None

    @property
    def known(self) -> ValidIds:
        """The ids that there are logits for."""
        return ValidIds(self.weight.shape[0]) if self.valid_ids is None else self.valid_ids

    def copy(self) -> "Head":
        """The same layer with weights of its own."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype of the matrix product for these hidden states."""
        if self.dtype is not None:
            return self.dtype
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def project(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [n, V] of hidden rows [n, H], in at least float32, without gradient; into `out` if it fits."""
        dtype = self.compute_dtype(hidden)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            part, weight = hidden.to(dtype), self.weight[: self.known.size].to(dtype)
            fits = out is not None and out.dtype == dtype and out.shape == (part.shape[0], weight.shape[0])
            product = matmul(part, weight, out if fits else None)
            if self.bias is not None:
                product.add_(self.bias[: self.known.size].to(dtype))
            logits = self.shape(widen(product))
            absent = self.known.absent
            return logits.index_fill_(-1, self.known.index(logits.device), -torch.inf) if absent else logits

    def log_outside(self, hidden: Tensor) -> Tensor | None:
        """Log-sum-exp [n] of the logits of the rows behind the last token, of hidden rows [n, H]; None where there are none."""
        size = self.known.size
        if size == self.weight.shape[0]:
            return None
        bias = None if self.bias is None else self.bias[size:]
        return replace(self, weight=self.weight[size:], bias=bias, valid_ids=None).project(hidden).logsumexp(-1)

    def shape(self, product: Tensor) -> Tensor:
        """Logits from the product, in place."""
        logits = product if self.scale == 1.0 else product.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def shape_gradient(self, logits: Tensor) -> Tensor | float:
        """The derivative of `shape`, computed from its output."""
        if self.softcap is None:
            return self.scale
        return (1 - (logits / self.softcap).square_()).mul_(self.scale)


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [n, k] times right [m, k], transposed; into `out` unless oneDNN computes it."""
    return product_by_onednn(left, right) if suits(left, right) else torch.mm(left, right.T, out=out)


def widen(logits: Tensor) -> Tensor:
    """A tensor in at least float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def head_loss(
    hidden: Tensor, head: Head, tokens: Tokens, scores: Mapping[str, TeacherScores], loss: TokenLoss, chunk: int = 256
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(tokens.weight x loss) over N tokens, differentiable in the hidden states and the head.

    A teacher is compared on the ids that it has and the student has too; see `shared.py` for those that only the student has.

    Args:
        hidden [N, H]: the student's hidden states that predict the tokens.
        head: the student's output layer.
        tokens: the N tokens with their weights.
        scores: of the teachers that `loss` reads, N rows each.
        chunk: rows whose logits exist at the same time. 256 suits a CPU, 1024 and more a GPU.

    Returns:
        The weighted sum (a scalar) and the statistics [N] of every token, with "loss" among them; where the layer is padded
        also "padding_mass", the probability that the model itself gives to rows behind the last token, of one token in
        `SPARSE` (NaN for the others). No token at all gives a zero with zero gradients.

    Raises:
        NotFinite: the sum is NaN or infinite.
    """
    if hidden.shape[0] == 0:
        return hidden.sum() + 0.0 * head.weight.sum(), {}
    stats: dict[str, Tensor] = {}
    # Statistics leave through a dict: as outputs of the autograd function they would be tracked as differentiable.
    total = _HeadLoss.apply(hidden, head.weight, head.bias, head, tokens, scores, loss, chunk, stats)
    if not torch.isfinite(total):
        raise NotFinite(reason(stats, tokens.weight, getattr(loss, "terms", ())))
    return total, stats


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, tokens, scores, loss, chunk, stats):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        dtype = head.compute_dtype(hidden)
        layer = replace(
            head, weight=weight.detach().to(dtype), bias=None if bias is None else bias.detach().to(dtype), dtype=dtype
        )
        valid_ids = layer.known
        matrix = layer.weight[: valid_ids.size]
        grad_hidden = torch.empty_like(hidden, dtype=wide) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        scratch = Scratch()
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                part = hidden[rows].detach().to(dtype)
                logits = layer.project(part, scratch.like("student", part, valid_ids.size)).to(wide)
                targets = {
                    name: fitted(
                        score.chunk(rows, scratch.like(name, part, score.vocabulary)), valid_ids_of(score), valid_ids, wide
                    )
                    for name, score in scores.items()
                }
                _note_padding(layer, part, logits, start, hidden.shape[0], stats)
                grad = _chunk_gradient(loss, logits, targets, tokens, start, layer, scratch, stats, any(ctx.needs_input_grad))
                if grad is not None:
                    _drop_uncounted(grad, stats["loss"][rows], tokens.weight[rows])
                    # The token weights multiply the products, which have H columns instead of V.
                    grad, share = grad.to(dtype), tokens.weight[rows, None].to(wide)
                    if grad_hidden is not None:
                        torch.mul(matmul(grad, matrix.T), share, out=grad_hidden[rows])
                    if grad_weight is not None:
                        _accumulate(grad_weight[: valid_ids.size], grad, (part * share).to(dtype))
                    if grad_bias is not None:
                        grad_bias[: valid_ids.size] += (grad * share).sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        loss, counted = stats["loss"], tokens.weight.to(wide)
        return torch.where(counted == 0, 0.0, counted * loss).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        # If the loss is the root of the graph, no second set of gradients is needed.
        factor = None if grad_total == 1 else grad_total
        scaled = [g if g is None or factor is None else g * factor for g in ctx.saved_tensors]
        grads = [None if g is None else g.to(t) for g, t in zip(scaled, ctx.dtypes, strict=True)]
        return (*grads, None, None, None, None, None, None)


def _chunk_gradient(
    loss: TokenLoss,
    logits: Tensor,
    targets: Mapping[str, Any],
    tokens: Tokens,
    start: int,
    layer: Head,
    scratch: Scratch,
    stats: dict[str, Tensor],
    needed: bool,
) -> Tensor | None:
    """Gradients [n, V] before the layer's scale and cap, in place of a chunk's student logits; None if not needed.

    A CPU processes the chunk in blocks: matrix products are fastest on many rows, the rest on small buffers. The loss and the
    statistics of tokens `start` to `start + n` are written into `stats`.
    """
    rows = logits.shape[0] if logits.is_cuda else max(1, BLOCK // logits[0].nbytes)
    for begin in range(0, logits.shape[0], rows):
        at = slice(start + begin, start + min(begin + rows, logits.shape[0]))
        block = logits[begin : begin + rows]
        block_targets = {name: target.take(slice(begin, begin + rows)) for name, target in targets.items()}
        derivative = layer.shape_gradient(block)  # before a closed form overwrites the logits
        value, grad, extra = graded(loss, block, block_targets, tokens.take(at), scratch, needed)
        for name, column in (extra | {"loss": value}).items():
            # One tensor each: small tensors between large ones would fragment a CPU's memory.
            if name not in stats:
                stats[name] = column.new_empty(tokens.ids.shape[0])
            stats[name][at] = column
        if grad is not None:
            block.copy_(grad if isinstance(derivative, float) and derivative == 1.0 else grad * derivative)
            if layer.known.absent:  # where the logits are -inf, the slope of a cap is no number
                block.index_fill_(-1, layer.known.index(block.device), 0.0)
    return logits if needed else None


def fitted(target: Any, known: ValidIds, valid_ids: ValidIds, dtype: torch.dtype) -> Any:
    """A teacher's target on the student's tokens, in a dtype; it knows which of them it covers, if these are not all.

    Args:
        known, valid_ids: the ids that the teacher has, and the student.
    """
    target = target.narrow(min(known.size, valid_ids.size), dtype)
    shared = valid_ids.intersection([known])
    if shared.absent and hasattr(target, "logits"):
        target = replace(target, logits=shared.cut(target.logits))
    return target if known.covers(valid_ids) else replace(target, shared=shared)


def _note_padding(layer: Head, part: Tensor, logits: Tensor, start: int, n: int, stats: dict[str, Tensor]) -> None:
    """Write the mass on padding of one of the chunk's tokens in `SPARSE` into the statistics [n], if the layer is padded."""
    outside = layer.log_outside(part[::SPARSE])
    if outside is None:
        return
    if "padding_mass" not in stats:
        stats["padding_mass"] = logits.new_full((n,), torch.nan)
    mass = torch.sigmoid(outside.to(logits.dtype) - logits[::SPARSE].logsumexp(-1))
    stats["padding_mass"][start : start + len(part) : SPARSE] = mass


def _drop_uncounted(slope: Tensor, loss: Tensor, weight: Tensor) -> None:
    """Zero the slopes [n, V] of tokens without weight whose loss is not finite: 0 x NaN would be NaN."""
    empty = (weight == 0) & ~torch.isfinite(loss)
    if empty.any():
        slope[empty] = 0.0


def graded(
    loss: TokenLoss, logits: Tensor, targets: Mapping[str, Any], tokens: Tokens, scratch: Scratch, needed: bool
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """The loss [n] of n tokens, its gradient [n, V] with respect to the student's logits (None if not needed), its statistics.

    Uses the loss's closed form, if it has one, else autograd. The logits may be overwritten.
    """
    if not needed:
        with torch.no_grad():
            value, extra = loss(logits, targets, tokens)
        return value, None, extra
    closed_form = getattr(loss, "closed_form", None)
    result = None if closed_form is None else closed_form(logits, targets, tokens, scratch)
    if result is not None:
        return result
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value, extra = loss(leaf, targets, tokens)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad, extra


def _accumulate(grad_weight: Tensor, grad: Tensor, part: Tensor) -> None:
    """grad_weight += grad.T @ part, in place where the dtypes allow it."""
    if grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.T, part)
    else:
        grad_weight += grad.T @ part
