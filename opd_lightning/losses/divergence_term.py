"""The divergence term: a divergence from the teacher, over a vocabulary support, with optional clip and importance ratio."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.closed_form import beta_of
from opd_lightning.losses.importance import update_ratio
from opd_lightning.losses.returns import Returns
from opd_lightning.types import Tokens

Entries = Callable[[Tensor, Tensor], Tensor]
"""A divergence of `divergences.py`: log-probabilities of the student and of another model to entries, all [n, V]."""


class DivergenceTerm:
    """A divergence of the student from the teacher on each token.

    Args:
        divergence: entries of the vocabulary.
        support: over which tokens of the vocabulary they are summed; see `vocab_support.py`.
        clip: bounds the divergence, see `clip.py`; None does not.
        ratio_cap: multiply by min(S / S_old, cap) of the written token from the second update on one rollout on (SDPO, arXiv
            2601.20802); None does not. A sampled token has its own ratio.
        scale: multiplies the value, such as the square of a temperature.
        returns: adds what a token leads to, see `returns.py`; None does not.

    Raises:
        ValueError: a clip, a cap, a divergence or returns that the support does not allow.
    """

    def __init__(
        self,
        divergence: Entries,
        support: Any,
        clip: Any,
        ratio_cap: float | None,
        scale: float,
        returns: Returns | None = None,
    ):
        if support is None:
            raise ValueError(
                "loss.divergence needs loss/vocab_support= to say over which tokens it is taken; full is the exact one."
            )
        if support.needs_own_samples and (clip is not None or ratio_cap is not None):
            raise ValueError(
                "loss/vocab_support=sampled takes neither loss/clip nor loss.ratio_cap; it has cost_limit, clip and "
                "importance_sampling_cap (loss/vocab_support=sampled_clipped), and its own ratio."
            )
        if support.needs_own_samples and not is_elementwise(divergence):
            raise ValueError(
                "loss/vocab_support=sampled needs a divergence whose entries follow from one token each; choose reverse_kl, or "
                "loss/vocab_support=full."
            )
        if ratio_cap is not None and not ratio_cap >= 1:
            raise ValueError(f"loss.ratio_cap={ratio_cap} must be at least 1; 2.0 is SDPO's, null leaves the ratio out.")
        if returns is not None and support.needs_own_samples and beta_of(divergence) != 1:
            raise ValueError(
                "loss/returns with loss/vocab_support=sampled needs loss/divergence=reverse_kl, which a token estimates; "
                "choose it, or loss/vocab_support=full."
            )
        self.divergence, self.support, self.clip, self.ratio_cap, self.scale = divergence, support, clip, ratio_cap, scale
        self.returns = returns

    @property
    def needs_own_samples(self) -> bool:
        """Whether it has a meaning on the student's own samples only."""
        return self.support.needs_own_samples or self.returns is not None

    def cost(self, log_s: Tensor, target: Any, tokens: Tokens) -> Tensor:
        """The divergence [n], or log S(y) - log T(y) as its estimate from the written token."""
        if self.support.needs_own_samples:
            return log_s.gather(-1, tokens.ids[:, None]).squeeze(-1) - target.of(tokens.ids)
        return self.support(self.divergence, log_s, target, tokens)

    def __call__(self, log_s: Tensor, target: Any, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The term [n], zero where the target is not valid, and the statistics of clip, ratio and support."""
        stats: dict[str, Tensor] = {}
        if self.clip is None:
            value = self.support(self.divergence, log_s, target, tokens)
        else:
            value, stats = self.clip(self.support, self.divergence, log_s, target, tokens)
        if self.ratio_cap is not None:
            logprob = log_s.detach().gather(-1, tokens.ids[:, None]).squeeze(-1)
            stats["ratio"] = update_ratio(logprob, tokens).clamp(max=self.ratio_cap)
            value = value * stats["ratio"]
        if target.valid is not None:
            value = torch.where(target.valid, value, 0.0)
        if self.returns is not None:
            assert tokens.future is not None, "returns are computed with the scores of a batch"
            logprob = log_s.gather(-1, tokens.ids[:, None]).squeeze(-1)
            value = value + update_ratio(logprob, tokens).detach() * tokens.future * logprob
            stats["future"] = tokens.future
        if self.needs_own_samples and tokens.own is not None:
            value = torch.where(tokens.own, value, 0.0)
        return self.scale * value, stats | self.support.describe(log_s, target)


def is_elementwise(divergence: Any) -> bool:
    """Whether entry v of a divergence follows from log S_v and log T_v alone; a partial as its function."""
    return getattr(divergence, "elementwise", getattr(getattr(divergence, "func", None), "elementwise", True))
