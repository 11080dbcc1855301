"""Closed forms of the three common divergences over the whole vocabulary, with the diagnostics from the same pass.

Other losses are differentiated by autograd on a chunk of logits, which takes more passes over the chunk. These work in place
on the logits. A test compares them with autograd.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl


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
        s, t: logits [n, V] of student and teacher, float32 or wider and finite; both are overwritten.

    Returns:
        The divergence [n], its gradient [n, V] (in place of the student's logits), and the statistics that `diagnose`
        gives, [n] each; top-1 agreement counts ties.
    """
    product = scratch.like("product", s)
    stats = {"top1_agreement": top_agreement(s, t)}
    log_s, p_s = _normalise(s, scratch.like("log_s", s))
    log_t, p_t = _normalise(t, scratch.like("log_t", t))
    stats |= {"student_entropy": -_dot(p_s, log_s, product), "teacher_entropy": -_dot(p_t, log_t, product)}
    if 0.0 < beta < 1.0:
        # A token whose probability underflows on both sides has m = 0; its terms are 0 whatever log m is.
        log_m = torch.mul(p_t, beta, out=scratch.like("log_m", s)).add_(p_s, alpha=1 - beta)
        log_m.clamp_min_(torch.finfo(s.dtype).tiny).log_()
        student_part = -stats["student_entropy"] - _dot(p_s, log_m, product)
        value = beta * (-stats["teacher_entropy"] - _dot(p_t, log_m, product)) + (1 - beta) * student_part
        factor = torch.sub(log_s, log_m, out=log_m).sub_(student_part[:, None]).mul_(1 - beta)
    gap = torch.sub(log_s, log_t, out=log_t)
    stats["forward_kl"], stats["reverse_kl"] = -_dot(p_t, gap, product), _dot(p_s, gap, product)
    if beta == 0.0:
        return stats["forward_kl"], p_s.sub_(p_t), stats
    if beta == 1.0:
        value, factor = stats["reverse_kl"], gap.sub_(stats["reverse_kl"][:, None])
    return value, p_s.mul_(factor), stats


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
