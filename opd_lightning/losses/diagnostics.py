"""Diagnostics: entropies, KLs and agreement of student and teacher on each token, for every loss."""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.aligned_targets import CoarseLogProbs, SortedLogProbs
from opd_lightning.losses.closed_form import top_agreement
from opd_lightning.losses.shared import View
from opd_lightning.losses.targets import FullLogProbs, SampledLogProbs, TopKLogProbs, log_tail
from opd_lightning.types import Tokens


@torch.no_grad()
def diagnose(log_s: Tensor, targets: Mapping[str, Any], ids: Tensor | None = None) -> dict[str, Tensor]:
    """Statistics in nats [n] from the student's log-probabilities [n, V] and the targets; `ids` [n] are the written tokens."""
    log_s = log_s.detach()
    p_s = log_s.exp()
    stats = {"student_entropy": -expect(p_s, log_s)}
    if "teacher" in targets:
        stats |= compare(targets["teacher"], log_s, p_s, ids)
    if "reference" in targets:
        stats["reference_kl"] = expect(p_s, log_s - targets["reference"].log_p)
    return stats


@torch.no_grad()
def diagnose_views(log_s: Tensor, views: Mapping[str, View], tokens: Tokens) -> dict[str, Tensor]:
    """Statistics for targets that may each cover a part of the student's tokens, and the student's mass outside of these."""
    if all(seen.log_s is log_s for seen in views.values()):
        return diagnose(log_s, {name: seen.target for name, seen in views.items()}, tokens.ids)
    stats: dict[str, Tensor] = {}
    for name, seen in views.items():
        stats |= diagnose(seen.log_s, {name: seen.target}, seen.tokens.ids) | seen.stats(name)
    return stats | diagnose(log_s, {})


@singledispatch
def compare(target: Any, log_s: Tensor, p_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """Statistics of student and teacher for a kind of target; none for unknown kinds."""
    return {}


@compare.register
def _(target: FullLogProbs, log_s: Tensor, p_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    log_t = target.log_p
    p_t, gap = log_t.exp(), log_s - log_t
    return {
        "forward_kl": -expect(p_t, gap),
        "reverse_kl": expect(p_s, gap),
        "teacher_entropy": -expect(p_t, log_t),
        "top1_agreement": top_agreement(log_s, log_t),
    }


@compare.register
def _(target: CoarseLogProbs, log_s: Tensor, p_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """KLs of the distributions over outcomes: lower bounds of those over the vocabulary."""
    gap = log_s - target.log_p
    return {
        "forward_kl_shared": -expect(target.log_p.exp(), gap),
        "reverse_kl_shared": expect(p_s, gap),
        "top1_agreement": top_agreement(log_s, target.log_p),
        "teacher_unshared_mass": -torch.expm1(target.log_mass.clamp(max=0.0)),
    }


@compare.register
def _(target: SortedLogProbs, log_s: Tensor, p_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    p_t = target.log_p.exp()
    return {"sorted_l1": (p_s - p_t).abs().sum(-1), "teacher_entropy": -expect(p_t, target.log_p)}


@compare.register
def _(target: TopKLogProbs, log_s: Tensor, p_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """KLs of the distributions over the teacher's top k and the rest: lower bounds of those over the vocabulary."""
    top, chosen, named = target.ids, target.logprobs, target.named
    log_s_top = log_s.gather(-1, top).masked_fill(~named, -torch.inf)
    log_t = torch.cat([chosen, target.log_tail(top)], -1)
    coarse = torch.cat([log_s_top, log_tail(log_s, top, named)], -1)
    stats = {
        "forward_kl_topk": -expect(log_t.exp(), coarse - log_t),
        "reverse_kl_topk": expect(coarse.exp(), coarse - log_t),
        "top1_agreement": (log_s_top[:, 0] == log_s.amax(-1)).to(log_s.dtype),
    }
    return stats | _log_ratio(target.sampled, log_s, ids)


@compare.register
def _(target: SampledLogProbs, log_s: Tensor, p_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    return _log_ratio(target.sampled, log_s, ids)


def _log_ratio(sampled: Tensor, log_s: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """log S(y) - log T(y) of the written token: on the student's own samples its mean estimates KL(S || T)."""
    return {} if ids is None else {"log_ratio": log_s.gather(-1, ids[:, None]).squeeze(-1) - sampled}


def expect(p: Tensor, x: Tensor) -> Tensor:
    """sum_v p_v x_v, [n, V] each, where a token of probability 0 adds nothing even if its x is infinite."""
    value = torch.linalg.vecdot(p, x)
    if value.isnan().any():
        value = torch.where(p == 0, 0.0, p * x).sum(-1)
    return value


def where_valid(stats: dict[str, Tensor], target: Any) -> dict[str, Tensor]:
    """The statistics, NaN for tokens without a target where they compare with one."""
    if target.valid is None:
        return stats
    other = {"student_entropy", "reference_kl", "reference_unshared_mass"}
    return {name: x if name in other else torch.where(target.valid, x, torch.nan) for name, x in stats.items()}
