"""Targets of teachers that combine others, reduced to the kind that all of them provide."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Provides
from opd_lightning.losses.targets import FullLogits, SampledLogProbs, TopKLogProbs
from opd_lightning.types import Sample

FIELDS: dict[Provides, tuple[Any, tuple[str, ...]]] = {
    "full": (FullLogits, ("logits",)),
    "topk": (TopKLogProbs, ("ids", "logprobs", "sampled")),
    "sampled": (SampledLogProbs, ("sampled",)),
}
"""The target of each kind, and its tensors with a row per token; the kinds that tell most come first."""


def richest(provides: frozenset[Provides]) -> Provides | None:
    """The kind that tells most; None without any."""
    return next((kind for kind in FIELDS if kind in provides), None)


def written_ids(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The ids [N] of the samples' trainable tokens."""
    return torch.cat([sample.token_ids[sample.loss_mask] for sample in samples]).to(device)


def reduced(target: Any, kind: Provides, ids: Tensor, k: int | None) -> Any:
    """A target as one of `kind`: exact, for it only leaves numbers out.

    Args:
        ids [n]: the written tokens, all of which the target covers.
        k: number of most probable tokens, at most as many as the target has.
    """
    if kind == "full":
        return target
    log_p = target.log_probs(1.0)
    if kind == "sampled":
        return SampledLogProbs(log_p.of_tokens(ids), target.valid)
    return replace(log_p.truncated(k, ids), valid=target.valid)


def joined(targets: Sequence[tuple[Tensor, Any]], kind: Provides, n: int, valid: Tensor | None) -> Any:
    """One target of n rows from several, each with the rows [n] that are its own, as bools."""
    target, names = FIELDS[kind]
    tensors: dict[str, Tensor] = {}
    for rows, part in targets:
        for name in names:
            values = getattr(part, name)
            tensors.setdefault(name, values.new_empty(n, *values.shape[1:]))[rows] = values
    return target(**tensors, valid=valid)
