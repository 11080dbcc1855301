"""Token weights that see: scores of student and teacher, and verdicts, over whole completions and groups.

As in `token_weights.py`, a weight maps the batch's tokens to [N]. Functions with `reads_scores` find statistics of student and
teacher in `tokens.seen`, from one more pass of the student without gradient: `student_logprob` and `teacher_logprob` of the
written token, `student_entropy`, and for teachers of the whole vocabulary `teacher_entropy`, `forward_kl` and `reverse_kl`.
NaN stands where the teacher has no target. Those with `reads_verdicts` find `tokens.reward` and `tokens.pass_rate`.
All are over single completions or the completions of one prompt, so that they depend neither on micro-batches nor devices.
"""

from typing import Any

import torch
from torch import Tensor

from opd_lightning.types import Tokens


def by_prefix_gap(tokens: Tokens, amplification: float = 0.5) -> Tensor:
    """1 + amplification (1 - P_t / P): less where the prefix has already left the teacher (IW-OPD, arXiv 2606.22600, alg. 1).

    P_t is the sum over the tokens before t of |log T(y) - log S(y)|, and P that over the completion. IW-OPD does not divide by
    the sum of the weights; loss/aggregate=constant does not, either.

    Raises:
        ValueError: the amplification is negative.
    """
    if amplification < 0:
        raise ValueError(f"loss.weight.amplification={amplification} must not be negative; 0.5 is IW-OPD's.")
    gap = (column(tokens, "teacher_logprob") - column(tokens, "student_logprob")).abs().nan_to_num(0.0)
    before, total = running(gap, tokens)
    return tokens.weight * (1 + amplification * (1 - before / total.clamp_min(1e-8)))


def ranked(tokens: Tokens, by: str = "student_entropy", keep: float = 0.5, lowest: bool = False) -> Tensor:
    """1 on the share `keep` of each completion's tokens with the highest (or lowest) of a statistic, and 0 elsewhere.

    The most uncertain half of the student's tokens (TIP, arXiv 2604.14084; REOPOLD's sampling of tokens, 2603.11137), or the
    least likely fifth (OPSA, 2608.31046). The papers rank the tokens of a batch.

    Raises:
        ValueError: keep is outside (0, 1], or there is no such statistic.
    """
    return tokens.weight * top_share(column(tokens, by) * (-1 if lowest else 1), tokens, keep)


def important(tokens: Tokens, keep: float = 0.5) -> Tensor:
    """1 on the share `keep` of tokens with the highest h + d - h d, and 0 elsewhere (TIP, arXiv 2604.14084).

    h is the student's entropy and d = KL(T || S), each scaled to [0, 1] within the completion: tokens where the student is
    uncertain, or confident against the teacher. TIP scales and ranks over a batch.

    Raises:
        ValueError: keep is outside (0, 1], or the teacher gives no whole vocabulary.
    """
    h, d = (unit_scaled(column(tokens, name), tokens) for name in ("student_entropy", "forward_kl"))
    return tokens.weight * top_share(h + d - h * d, tokens, keep)


def by_perplexity(tokens: Tokens, temperature: float = 1.0) -> Tensor:
    """Weights of completions within their prompt: right ones by the student's surprise, wrong ones by the teacher's confidence.

    SCOPE (arXiv 2604.10688, eq. 4 and 5): w_i is proportional to PPL_S(y_i)^(1/temperature) among the right completions of a
    prompt, and to PPL_T(y_i)^(-1/temperature) among the wrong ones; both sum to 1. With loss/gate=by_verdict and
    loss/aggregate=sequence_sum this is SCOPE's objective.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"loss.weight.temperature={temperature} must be positive; 1 is SCOPE's.")
    sample, reward, group = tokens.sample, tokens.reward, tokens.group
    assert sample is not None and reward is not None and group is not None
    right = reward >= 1
    surprise = torch.where(right, -column(tokens, "student_logprob"), column(tokens, "teacher_logprob").nan_to_num(0.0))
    score = mean_by_sample(surprise, tokens) / temperature  # of each sample
    first = torch.zeros_like(score, dtype=torch.long).scatter_(0, sample, torch.arange(len(sample), device=sample.device))
    set_of = 2 * group[first] + right[first].long()
    counted = torch.zeros_like(score).index_add_(0, sample, (tokens.weight > 0).to(score.dtype)) > 0
    same = (set_of[:, None] == set_of[None, :]) & counted[None, :]
    weight = (score - torch.where(same, score[None, :], -torch.inf).logsumexp(1)).exp()
    return tokens.weight * weight[sample]


def by_pass_rate(tokens: Tokens, rising: float = 1.0, falling: float = 1.0) -> Tensor:
    """p^rising (1 - p)^falling, p being the mean reward of the prompt's completions (PACED, arXiv 2603.11178).

    Prompts that the student always or never solves have weight 0.

    Raises:
        ValueError: an exponent is negative.
    """
    if rising < 0 or falling < 0:
        raise ValueError(f"loss.weight.rising={rising} and falling={falling} must not be negative; 1 and 1 are PACED's.")
    p = tokens.pass_rate
    assert p is not None
    return tokens.weight * p**rising * (1 - p) ** falling


SCORES: tuple[Any, ...] = (by_prefix_gap, ranked, important, by_perplexity)
TEACHERS: tuple[Any, ...] = (by_prefix_gap, important, by_perplexity)
VERDICTS: tuple[Any, ...] = (by_perplexity, by_pass_rate)
COLUMNS: dict[Any, tuple[str, ...]] = {important: ("student_entropy", "forward_kl")}
for _function in SCORES:
    _function.reads_scores = True
for _function in TEACHERS:
    _function.reads_teachers = frozenset({"teacher"})
for _function in VERDICTS:
    _function.reads_verdicts = True


def columns_read(weight: Any) -> set[str]:
    """The statistics that a token weight names; a partial's own among them."""
    named = getattr(weight, "keywords", {}).get("by")
    return {*COLUMNS.get(getattr(weight, "func", weight), ()), *((named,) if isinstance(named, str) else ())}


def column(tokens: Tokens, name: str) -> Tensor:
    """A statistic [N] of the batch.

    Raises:
        ValueError: there is none of this name.
    """
    seen = tokens.seen or {}
    if name not in seen:
        raise ValueError(
            f"loss.weight reads {name}, and this loss and teacher give {', '.join(sorted(seen)) or 'none'}; choose another "
            "weight, or a teacher of the whole vocabulary."
        )
    return seen[name]


def running(value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """For each token the sum of a value [N] over the tokens before it in its sample, and that over the sample."""
    assert tokens.sample is not None
    first = torch.nonzero(tokens.position == 0).squeeze(1)
    table = value.new_zeros(len(first), int(tokens.position.max()) + 1)
    row = torch.bucketize(torch.arange(len(value), device=value.device), first, right=True) - 1
    table[row, tokens.position] = value
    before = table.cumsum(1) - table
    return before[row, tokens.position], table.sum(1)[row]


def mean_by_sample(value: Tensor, tokens: Tokens) -> Tensor:
    """The mean of a value [N] over the tokens of each sample [B]."""
    assert tokens.sample is not None
    samples = int(tokens.sample.max()) + 1
    count = torch.bincount(tokens.sample, minlength=samples).clamp_min(1)
    return value.new_zeros(samples).index_add(0, tokens.sample, value) / count


def unit_scaled(value: Tensor, tokens: Tokens) -> Tensor:
    """A value [N] scaled to [0, 1] within each sample; 0 where it is NaN, or the same throughout."""
    low, high = (extreme(value, tokens, kind) for kind in ("amin", "amax"))
    return ((value - low) / (high - low)).nan_to_num(0.0, 0.0, 0.0)


def extreme(value: Tensor, tokens: Tokens, kind: str) -> Tensor:
    """The smallest or largest finite value of each token's sample [N]."""
    assert tokens.sample is not None
    start = torch.inf if kind == "amin" else -torch.inf
    table = value.new_full((int(tokens.sample.max()) + 1,), start)
    return table.scatter_reduce(0, tokens.sample, value.nan_to_num(start, start, start), kind)[tokens.sample]


def top_share(score: Tensor, tokens: Tokens, keep: float) -> Tensor:
    """1 on the ceil(keep x n) tokens of each sample with the highest score [N], the earlier one of equals, and 0 elsewhere."""
    if not 0 < keep <= 1:
        raise ValueError(f"loss.weight.keep={keep} must lie in (0, 1]; 1 keeps every token.")
    assert tokens.sample is not None
    order = torch.argsort(score.nan_to_num(-torch.inf), descending=True, stable=True)
    order = order[torch.argsort(tokens.sample[order], stable=True)]
    counts = torch.bincount(tokens.sample)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - starts[tokens.sample[order]]
    kept = rank < torch.ceil(keep * counts - 1e-9)[tokens.sample[order]]
    return torch.zeros_like(score).scatter(0, order, kept.to(score.dtype))
