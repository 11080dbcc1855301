"""Closed forms of the three common divergences over the whole vocabulary, with the diagnostics from the same pass.

Other losses are differentiated by autograd on a chunk of logits, which takes more passes over the chunk. These work in place
on the logits. A test compares them with autograd.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.divergences import forward_kl, jsd, largest_ratio, reverse_kl


def beta_of(divergence: Any) -> float | None:
    """The beta of the generalised JSD that a divergence is (0 forward, 1 reverse KL); None if it is another."""
    if isinstance(divergence, partial) and divergence.func is jsd and not divergence.args:
        return float(divergence.keywords.get("beta", 0.5))
    plain = divergence.func if isinstance(divergence, partial) and not divergence.keywords else divergence
    return {forward_kl: 0.0, reverse_kl: 1.0, jsd: 0.5}.get(plain)


class Scratch:
    """Buffers that successive chunks reuse: on a CPU, allocating them would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def like(self, name: str, reference: Tensor, columns: int | None = None) -> Tensor:
        """An uninitialised tensor with the rows, dtype and device of `reference`, and its columns unless `columns` is given."""
        rows, width = reference.shape[0], reference.shape[1] if columns is None else columns
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] != width or buffer.dtype != reference.dtype:
            buffer = self.buffers[name] = torch.empty(rows, width, dtype=reference.dtype, device=reference.device)
        return buffer[:rows]


@torch.no_grad()
def generalised_jsd(s: Tensor, t: Tensor, beta: float, scratch: Scratch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Value, gradient and diagnostics of JSD_beta of the student from the teacher.

    With m = beta T + (1 - beta) S, the gradients with respect to the student's logits are S - T (beta = 0),
    S (log S - log T - KL(S || T)) (beta = 1) and (1 - beta) S (log S - log m - KL(S || m)) between.

    Args:
        s, t: logits [n, V] of student and teacher, float32 or wider; both are overwritten. -inf contributes its limit.

    Returns:
        The divergence [n], its gradient [n, V] (in place of the student's logits), and the statistics that `diagnose`
        gives, [n] each; top-1 agreement counts ties.
    """
    product = scratch.like("product", s)
    stats = {"top1_agreement": top_agreement(s, t)}
    log_s, p_s = _normalise(s, scratch.like("log_s", s))
    log_t, p_t = _normalise(t, scratch.like("log_t", t))
    stats |= {"student_entropy": -_dot(p_s, log_s, product), "teacher_entropy": -_dot(p_t, log_t, product)}
    infinite = None
    if torch.stack([stats["student_entropy"], stats["teacher_entropy"]]).isnan().any():
        # 0 x -inf is NaN, so this finds logits of -inf without a pass of its own; few models have any.
        infinite = _make_finite(log_s, log_t, p_s, p_t)
        stats |= {"student_entropy": -_dot(p_s, log_s, product), "teacher_entropy": -_dot(p_t, log_t, product)}
    # As the ratio to the side that m is nearer to, see `_mixed`.
    ratio = torch.sub(log_t, log_s, out=log_t) if beta <= 0.5 else torch.sub(log_s, log_t, out=log_t)
    of_t, of_s = _dot(p_t, ratio, product), _dot(p_s, ratio, product)
    stats |= {"forward_kl": of_t, "reverse_kl": -of_s} if beta <= 0.5 else {"forward_kl": -of_t, "reverse_kl": of_s}
    if infinite is not None:
        for name, rows in zip(("forward_kl", "reverse_kl"), infinite, strict=True):
            stats[name] = stats[name].masked_fill(rows, torch.inf)
    if beta == 0.0:
        return stats["forward_kl"], p_s.sub_(p_t), stats
    if beta == 1.0:
        return stats["reverse_kl"], p_s.mul_(ratio.sub_(stats["reverse_kl"][:, None])), stats
    value, slope = _mixed(p_s, p_t, ratio, beta, log_s, product)
    return value, slope, stats


def _mixed(p_s: Tensor, p_t: Tensor, ratio: Tensor, beta: float, room: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """JSD_beta [n] and its slope (in place of p_s), 0 < beta < 1.

    m is seen from the side that it is nearer to: log(m / S) = log1p(beta (T / S - 1)) keeps its digits where log m - log S
    has lost them, which for a small beta is everywhere.

    Args:
        p_s, p_t: probabilities [n, V].
        ratio: log T - log S for beta <= 0.5, else log S - log T.
        room, product: buffers of that size; all tensors are overwritten.
    """
    near, far, share = (p_s, p_t, beta) if beta <= 0.5 else (p_t, p_s, 1 - beta)
    excess = torch.expm1(ratio, out=room).mul_(share).log1p_()  # log m - log near
    of_near = -_dot(near, excess, product)
    if not torch.isfinite(of_near).all():
        # The ratio is too large for expm1: near is 0 there, and so is what near adds whatever the ratio is.
        excess = torch.expm1(ratio.clamp_(max=largest_ratio(ratio.dtype)), out=room).mul_(share).log1p_()
        of_near = -_dot(near, excess, product)
    of_far = _dot(far, ratio.sub_(excess), product)
    value = (1 - share) * of_near + share * of_far
    # The slope is (1 - beta) S (log S - log m - KL(S || m)).
    if beta <= 0.5:
        return value, p_s.mul_(excess.add_(of_near[:, None])).mul_(beta - 1)
    return value, p_s.mul_(((beta - 1) * of_far)[:, None]).add_(product, alpha=1 - beta)


def _make_finite(log_s: Tensor, log_t: Tensor, p_s: Tensor, p_t: Tensor) -> tuple[Tensor, Tensor]:
    """Large negative numbers in place of -inf; returns the rows [n] whose forward KL is infinite, and whose reverse KL is."""
    none_s, none_t = log_s == -torch.inf, log_t == -torch.inf
    for log_p, none in ((log_s, none_s), (log_t, none_t)):
        log_p.masked_fill_(none, torch.finfo(log_p.dtype).min / 4)
    return (none_s & (p_t > 0)).any(-1), (none_t & (p_s > 0)).any(-1)


def top_agreement(s: Tensor, t: Tensor) -> Tensor:
    """1 where the teacher's (first) top token is a top token of the student too, else 0; [n] from scores [n, V]."""
    top = t.argmax(-1, keepdim=True)
    return (s.gather(-1, top) == s.amax(-1, keepdim=True)).squeeze(-1).to(s.dtype)


def _normalise(logits: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (in the buffer) and probabilities (in place of the logits)."""
    log_p = torch.log_softmax(logits, -1, out=buffer)
    return log_p, torch.exp(log_p, out=logits)


def _dot(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """sum_v a_v b_v, [n], by way of a buffer."""
    return torch.mul(a, b, out=product).sum(-1)
