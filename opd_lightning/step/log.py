"""Logging of a training step: rollout, tokens and FLOPs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Teacher
from opd_lightning.data.batching import Batch
from opd_lightning.models.flops import Sizes, update_flops
from opd_lightning.types import Rollout, Tokens
from opd_lightning.utils.metrics import StepMetrics

POSITIONS = (0, 4, 16, 64, 256, 1024, 10**9)
"""Boundaries of the parts of a completion whose KLs are logged separately."""


def log_rollout(metrics: StepMetrics, rollout: Rollout, flops: int) -> None:
    """Log lengths, truncation, tokens and FLOPs of a rollout; `flops` are those of the student's generation."""
    samples = rollout.samples
    lengths = torch.tensor([sample.trainable for sample in samples])
    own = torch.tensor([sample.source == "student" for sample in samples])
    metrics.mean("rollout/length", lengths)
    metrics.mean("rollout/truncated", torch.tensor([sample.finish_reason == "length" for sample in samples]))
    for name in dict.fromkeys(name for sample in samples for name in sample.metrics):
        metrics.mean(f"rollout/{name}", torch.tensor([float(sample.metrics.get(name, 0.0)) for sample in samples]))
    metrics.total("prompt_tokens", sum(sample.prompt_length for sample in samples))
    metrics.total("completion_tokens", int(lengths.sum()))
    metrics.total("student_tokens", int((lengths * own).sum()))
    metrics.total("teacher_tokens", rollout.teacher_cost.tokens)
    metrics.total("flops/rollout", flops + rollout.teacher_cost.flops)
    if any(sample.metrics for sample in samples):
        metrics.total("flops/environment", sum(sample.environment_flops for sample in samples))


def log_tokens(
    metrics: StepMetrics,
    loss: Tensor,
    stats: Mapping[str, Tensor],
    tokens: Tokens,
    live: bool,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Log the loss and the statistics [N] of a micro-batch, over tokens that count; KLs also by position and routed teacher."""
    metrics.total("train/loss", loss)
    counted = (tokens.weight > 0) & live
    for name, values in stats.items():
        metrics.mean(f"train/{name}", values, where=counted & ~values.isnan())
    for low, high in pairwise(POSITIONS):
        for name in sorted({"forward_kl", "reverse_kl", "top1_agreement"} & set(stats)):
            inside = counted & (tokens.position >= low) & (tokens.position < high) & ~stats[name].isnan()
            metrics.mean(f"position/{name}_from_{low}", stats[name], where=inside)
    for teacher, reads in getattr((scores or {}).get("teacher"), "by_teacher", {}).items():
        for name in sorted({"forward_kl", "reverse_kl", "reverse_kl_shared", "reverse_kl_topk", "log_ratio"} & set(stats)):
            metrics.mean(f"teacher/{teacher}/{name}", stats[name], where=counted & reads & ~stats[name].isnan())


def log_flops(metrics: StepMetrics, student: Sizes, batch: Batch, teachers: Sequence[Teacher]) -> None:
    """Log the FLOPs of an update: the student's passes over the active samples, and the teachers' logits on their tokens."""
    active = [batch.samples[b] for b in batch.active]
    positions = sum(sample.trainable for sample in active)
    flops = update_flops(student, active) | {"teacher": sum(teacher.logit_flops(positions) for teacher in teachers)}
    for part, n in flops.items():
        metrics.total(f"flops/{part}", n)
