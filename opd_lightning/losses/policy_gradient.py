"""Per-token losses beside divergences: cross-entropy and the policy gradient. Advantages are in `advantages.py`."""

from collections.abc import Callable

import torch
from torch import Tensor

from opd_lightning.losses.credit import CREDITS
from opd_lightning.losses.importance import check_cap, sampler_ratio, update_ratio
from opd_lightning.types import Tokens


class CrossEntropy:
    """-log S(y): imitate the written token (SFT on reference completions)."""

    needs_own_samples = False

    def __call__(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log_s [n, V]. Returns the loss [n] and no statistics."""
        return -log_s.gather(-1, tokens.ids[:, None]).squeeze(-1), {}


class Unlikelihood:
    """max(r, 1 - clip), r being S(y) / S_old(y): push down what the student has written, a policy gradient of advantage -1.

    On its least likely tokens (loss/weight=ranked) this is a control without teacher, reward or context: a fixed negative
    advantage there does much of what a sampled-token divergence does (OPSA, arXiv 2608.31046, which also scales it by entropy).

    Args:
        clip: r is not pushed further below 1; None never stops.
    """

    needs_own_samples = True

    def __init__(self, clip: float | None = 0.2):
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"loss.cross_entropy.clip={clip} must lie between 0 and 1; null never clips.")
        self.clip = clip

    def __call__(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log_s [n, V]. Returns the loss [n] and the ratio."""
        ratio = update_ratio(log_s.gather(-1, tokens.ids[:, None]).squeeze(-1), tokens)
        return ratio if self.clip is None else ratio.clamp(min=1 - self.clip), {"ratio": ratio.detach()}


class PolicyGradient:
    """-min(r A, clip(r, 1 - clip, 1 + clip_high) A) with r the ratio to the policy before the first update.

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7). Without a clip it is -r A, whose gradient on the first update is
    REINFORCE's -A grad log S(y) (Williams 1992).

    Args:
        advantage: maps the rewards [P, G] of the whole batch (P prompts, G samples each) to advantages [P, G].
        clip: how far the ratio may fall, and rise unless `clip_high` is given; None never clips.
        clip_high: how far the ratio may rise (DAPO's clip-higher, arXiv 2503.14476).
        importance_sampling_cap: multiply by min(policy / sampler, cap), see `importance.py`; None leaves it out.
        credit: the rewards of an episode that each of its replies answers for, see `credit.py`; all alike with one reply.
    """

    def __init__(
        self,
        advantage: Callable[[Tensor], Tensor],
        clip: float | None = 0.2,
        clip_high: float | None = None,
        importance_sampling_cap: float | None = None,
        credit: str = "episode",
    ):
        if credit not in CREDITS:
            raise ValueError(f"loss.policy_gradient.credit={credit!r} is unknown; choose {', '.join(CREDITS)}.")
        self.credit = CREDITS[credit]
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"loss.policy_gradient.clip={clip} must lie between 0 and 1; null never clips.")
        if clip_high is not None and (clip is None or not clip_high > 0):
            raise ValueError(f"loss.policy_gradient.clip_high={clip_high} must be positive and needs clip beside it.")
        check_cap("loss.policy_gradient", importance_sampling_cap)
        self.advantage, self.clip, self.importance_sampling_cap = advantage, clip, importance_sampling_cap
        self.clip_high = clip if clip_high is None else clip_high

    def __call__(self, log_s: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log_s [n, V]; `tokens.advantage` must be set. Returns the loss [n] and the statistics of ratio and clip."""
        assert tokens.advantage is not None, "a policy gradient needs advantages"
        logprob = log_s.gather(-1, tokens.ids[:, None]).squeeze(-1)
        ratio = update_ratio(logprob, tokens)
        gain, stats = ratio * tokens.advantage, {"ratio": ratio.detach()}
        if self.clip is not None:
            assert self.clip_high is not None
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip_high) * tokens.advantage
            stats["clip_fraction"] = (clipped < gain).to(gain.dtype)
            gain = torch.minimum(gain, clipped)
        if self.importance_sampling_cap is not None:
            stats["sampler_ratio"] = sampler_ratio(logprob, tokens, self.importance_sampling_cap)
            gain = gain * stats["sampler_ratio"]
        return -gain, stats
