"""Closed forms of the three common divergences over the whole vocabulary, with the diagnostics from the same pass.

Everything else is differentiated by autograd on a chunk of logits, which is exact too, but passes over the chunk more often.
These work in place on logits that nobody needs afterwards. A test holds them equal to the autograd path.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.divergence import forward_kl, jsd, reverse_kl


def beta_of(divergence: Any) -> float | None:
    """The beta of the generalised JSD that a divergence is (0 forward, 1 reverse KL); None if it is another."""
    if isinstance(divergence, partial) and divergence.func is jsd and not divergence.args:
        return float(divergence.keywords.get("beta", 0.5))
    plain = divergence.func if isinstance(divergence, partial) and not divergence.keywords else divergence
    return {forward_kl: 0.0, reverse_kl: 1.0, jsd: 0.5}.get(plain)


class Scratch:
    """Buffers that one chunk after the other works in: fresh ones of this size cost a CPU as much as the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def like(self, name: str, model: Tensor, columns: int | None = None) -> Tensor:
        """An uninitialised tensor of a tensor's rows, dtype and device, with its columns or other ones."""
        rows, width = model.shape[0], model.shape[1] if columns is None else columns
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] != width or buffer.dtype != model.dtype:
            buffer = self.buffers[name] = torch.empty(rows, width, dtype=model.dtype, device=model.device)
        return buffer[:rows]


@torch.no_grad()
def generalised_jsd(s: Tensor, t: Tensor, beta: float, scratch: Scratch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Value, slope and diagnostics of JSD_beta of the student from the teacher.

    With m = beta T + (1 - beta) S, the slopes with respect to the student's logits are S - T (beta = 0),
    S (log S - log T - KL(S || T)) (beta = 1) and (1 - beta) S (log S - log m - KL(S || m)) between.

    Args:
        s, t: logits [n, V] of student and teacher, float32 or wider and finite; both are overwritten.

    Returns:
        The divergence [n], its slope [n, V] (valid until the scratch is used again), and the statistics that `diagnose`
        gives, [n] each; students and teachers that share a top token agree, ties included.
    """
    top_s, top_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    agreement = (s == top_s).logical_and_(t == top_t).any(-1).to(s.dtype)
    log_s, p_s = _normalise(s, top_s, scratch.like("p_s", s))
    log_t, p_t = _normalise(t, top_t, scratch.like("p_t", t))
    stats = {"student_entropy": -_dot(p_s, log_s), "teacher_entropy": -_dot(p_t, log_t), "top1_agreement": agreement}
    if 0.0 < beta < 1.0:
        # A token that neither side gives a measurable probability has m = 0; its terms are 0 whatever log m is.
        log_m = torch.mul(p_t, beta, out=scratch.like("log_m", s)).add_(p_s, alpha=1 - beta)
        log_m.clamp_min_(torch.finfo(s.dtype).tiny).log_()
        student_part = -stats["student_entropy"] - _dot(p_s, log_m)
        value = beta * (-stats["teacher_entropy"] - _dot(p_t, log_m)) + (1 - beta) * student_part
        slope = torch.sub(log_s, log_m, out=log_m).sub_(student_part[:, None]).mul_(p_s).mul_(1 - beta)
    gap = torch.sub(log_s, log_t, out=log_t)
    stats["forward_kl"], stats["reverse_kl"] = -_dot(p_t, gap), _dot(p_s, gap)
    if beta == 0.0:
        value, slope = stats["forward_kl"], p_s.sub_(p_t)
    elif beta == 1.0:
        value, slope = stats["reverse_kl"], gap.sub_(stats["reverse_kl"][:, None]).mul_(p_s)
    return value, slope, stats


def _normalise(logits: Tensor, top: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (in place of the logits) and probabilities (into `p`), in as few passes as there can be."""
    torch.exp(logits.sub_(top), out=p)
    total = p.sum(-1, keepdim=True)
    return logits.sub_(total.log()), p.div_(total)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without a product of the size of its factors."""
    return torch.linalg.vecdot(a, b)
