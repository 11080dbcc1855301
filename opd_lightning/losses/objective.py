"""The objective: a sum of per-token terms on chunks of logits, with its token weights and its normaliser."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.closed_form import Scratch, beta_of, generalised_jsd, top_agreement
from opd_lightning.losses.importance import update_ratio
from opd_lightning.losses.policy_gradient import CrossEntropy, PolicyGradient
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.types import Rollout, Tokens

Entries = Callable[[Tensor, Tensor], Tensor]
"""A divergence of `divergence.py`: log-probabilities of the student and of another model to entries, all [n, V]."""


class Objective:
    """What a method minimises: sum over tokens of weight x (sum over terms of coefficient x term) / Z.

    Args:
        weight: which tokens count; see `weight.py`.
        aggregate: what the sum is divided by; see `weight.py`.
        divergence: a divergence from the teacher. None: no teacher is needed.
        support: over which tokens that divergence is taken; see `support.py`.
        policy_gradient: a term on rewarded completions. None: no verifier is needed.
        cross_entropy: a term on the written tokens.
        reference: a divergence from a reference model, over the whole vocabulary, to stay near it. None: none is needed.
        coefficients: of the terms "divergence", "policy_gradient", "cross_entropy" and "reference"; 1 unless given, and
            0 drops the term.
        clip: bounds the divergence, see `clip.py`; None does not.
        ratio_cap: multiply the divergence by min(S / S_old, cap) of the written token from the second update on one rollout
            on (SDPO, arXiv 2601.20802); None does not. A sampled token has its own ratio.
        temperature: divides all logits in every term and every logged KL; keep it equal to the sampling temperature
            unless you mean otherwise.
        temperature_squared: multiply the divergence by temperature^2, so that its gradients keep their size (Hinton et al.
            2015, arXiv 1503.02531, section 2).

    Raises:
        ValueError: no term at all, a coefficient of no term or a negative one, a temperature that is not positive, a clip or
            a divergence that the support cannot take.
    """

    TERMS = ("divergence", "policy_gradient", "cross_entropy", "reference")

    def __init__(
        self,
        weight: Callable[[Rollout], Tensor],
        aggregate: Callable[[Tensor], tuple[Tensor, Tensor]],
        divergence: Entries | None = None,
        support: Any = None,
        policy_gradient: PolicyGradient | None = None,
        cross_entropy: CrossEntropy | None = None,
        reference: Entries | None = None,
        clip: Any = None,
        ratio_cap: float | None = None,
        coefficients: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        temperature_squared: bool = False,
    ):
        for name, value in (coefficients or {}).items():
            if name not in self.TERMS:
                raise ValueError(f"loss.coefficients.{name}={value} is of no term; terms are {', '.join(self.TERMS)}.")
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"loss.coefficients.{name}={value!r} must be a number that is not negative; 0 drops the term.")
        off = {name for name, value in (coefficients or {}).items() if value == 0}
        divergence = None if "divergence" in off else divergence
        policy_gradient = None if "policy_gradient" in off else policy_gradient
        cross_entropy = None if "cross_entropy" in off else cross_entropy
        reference = None if "reference" in off else reference
        if divergence is None and policy_gradient is None and cross_entropy is None:
            raise ValueError("the loss has no term: choose loss/divergence=, loss/policy_gradient= or loss/cross_entropy=.")
        if divergence is not None and support is None:
            raise ValueError("loss.divergence needs loss/support= to say over which tokens it is taken; full is the exact one.")
        if divergence is not None and support.needs_own_samples and (clip is not None or ratio_cap is not None):
            raise ValueError(
                "loss/support=sampled takes neither loss/clip nor loss.ratio_cap; it has sampler_cap and its own ratio."
            )
        if divergence is not None and support.needs_own_samples and not getattr(divergence, "elementwise", True):
            raise ValueError(
                "loss/support=sampled needs a divergence whose entries follow from one token each; choose reverse_kl, or "
                "loss/support=full."
            )
        if ratio_cap is not None and not ratio_cap >= 1:
            raise ValueError(f"loss.ratio_cap={ratio_cap} must be at least 1; 2.0 is SDPO's, null leaves the ratio out.")
        if not temperature > 0:
            raise ValueError(f"loss.temperature={temperature} must be positive; 1.0 is the models' own distribution.")
        self.weight, self.aggregate, self.temperature = weight, aggregate, temperature
        self.divergence, self.support, self.reference = divergence, support, reference
        self.policy_gradient, self.cross_entropy = policy_gradient, cross_entropy
        self.clip, self.ratio_cap = clip, ratio_cap
        self.stretch = temperature**2 if temperature_squared else 1.0
        self.coefficients = dict.fromkeys(self.TERMS, 1.0) | dict(coefficients or {})

    @property
    def sources(self) -> frozenset[str]:
        """Names of the distributions beside the student's that the terms read."""
        read = {"teacher": self.divergence, "reference": self.reference}
        return frozenset(name for name, term in read.items() if term is not None)

    def weights(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Token weights [B, T] and this device's share of the normaliser Z."""
        return self.aggregate(self.weight(rollout))

    @property
    def terms(self) -> set[str]:
        """Names of the terms that there are."""
        return {name for name in self.TERMS if getattr(self, name) is not None}

    @property
    def rewarded(self) -> bool:
        """Does a term read rewards?"""
        return self.policy_gradient is not None

    @property
    def compares_updates(self) -> bool:
        """Does a term read log-probabilities of before the first update on a rollout?"""
        own = self.divergence is not None and (self.support.needs_own_samples or self.ratio_cap is not None)
        return self.rewarded or own

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [P, G] from the rewards [P, G] of the whole batch: P prompts, G samples each."""
        assert self.policy_gradient is not None
        return self.policy_gradient.advantage(rewards)

    def active(self, weight: Tensor, advantages: Tensor | None, told: Tensor | None = None) -> Tensor:
        """Number of tokens that can have a gradient, of weights [B, T]: not by an advantage of 0, nor by an untold teacher.

        Args:
            advantages [B], told [B]: of the completions; None has none, and tells all.
        """
        signal = torch.full_like(weight[:, 0], bool(self.terms & {"cross_entropy", "reference"})).bool()
        if self.divergence is not None:
            signal = signal | (torch.ones_like(signal) if told is None else told)
        if advantages is not None:
            signal = signal | (advantages != 0)
        return ((weight > 0) & signal[:, None]).sum()

    def __call__(self, logits: Mapping[str, Tensor], tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The per-token loss of a chunk.

        Args:
            logits: "student" and each of `sources`, [n, V] in at least float32.
            tokens: the chunk's n tokens.

        Returns:
            The loss [n], and statistics [n] that carry no gradient: KLs in both directions, entropies, agreement, and
            each term where there are several.
        """
        log_p = {name: torch.log_softmax(self.cooled(value), -1) for name, value in logits.items()}
        log_s, stats = log_p["student"], diagnose(log_p)
        terms: dict[str, Tensor] = {}
        if self.divergence is not None:
            terms["divergence"], extra = self.distance(log_s, log_p["teacher"], tokens)
            stats |= extra
            if tokens.told is not None:  # what an untold teacher seems to say is no number at all
                of_teacher = {"forward_kl", "reverse_kl", "teacher_entropy", "top1_agreement", *extra}
                stats |= {name: torch.where(tokens.told, stats[name], torch.nan) for name in of_teacher}
        if self.policy_gradient is not None:
            terms["policy_gradient"], extra = self.policy_gradient(log_s, tokens)
            stats |= extra
        if self.cross_entropy is not None:
            terms["cross_entropy"], extra = self.cross_entropy(log_s, tokens)
            stats |= extra
        if self.reference is not None:
            terms["reference"] = self.reference(log_s, log_p["reference"]).sum(-1)
        if len(terms) > 1:
            stats |= {f"{name}_loss": value.detach() for name, value in terms.items()}
        return torch.stack([self.coefficients[name] * value for name, value in terms.items()]).sum(0), stats

    def cooled(self, logits: Tensor) -> Tensor:
        """Divided by the temperature, without a copy where that is 1."""
        return logits if self.temperature == 1.0 else logits / self.temperature

    def distance(self, log_s: Tensor, log_t: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The divergence term [n] and what clip and ratio did to it."""
        stats: dict[str, Tensor] = {}
        if self.clip is None:
            value = self.support(self.divergence, log_s, log_t, tokens)
        else:
            value, stats = self.clip(self.support, self.divergence, log_s, log_t, tokens)
        if self.ratio_cap is not None:
            logprob = log_s.detach().gather(-1, tokens.ids[:, None]).squeeze(-1)
            stats["ratio"] = update_ratio(logprob, tokens).clamp(max=self.ratio_cap)
            value = value * stats["ratio"]
        if tokens.told is not None:
            value = torch.where(tokens.told, value, 0.0)
        return self.stretch * value, stats | self.support.describe(log_s, log_t)

    def closed_form(
        self, logits: Mapping[str, Tensor], tokens: Tokens, scratch: Scratch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """The loss [n], its slope [n, V] and the statistics without autograd, where this objective has a closed form.

        That is one exact divergence of the three common ones and nothing else. The logits are overwritten.
        """
        others = (self.policy_gradient, self.cross_entropy, self.reference, self.clip, self.ratio_cap)
        beta = beta_of(self.divergence)
        if beta is None or not isinstance(self.support, FullVocabulary) or any(part is not None for part in others):
            return None
        s, t = logits["student"], logits["teacher"]
        if self.temperature != 1.0:
            s, t = s.div_(self.temperature), t.div_(self.temperature)
        value, slope, stats = generalised_jsd(s, t, beta, scratch)
        factor = self.coefficients["divergence"] * self.stretch
        if factor / self.temperature != 1.0:
            slope.mul_(factor / self.temperature)
        return factor * value, slope, stats

    def log_prob(self, logits: Mapping[str, Tensor], tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """In the form of a loss that the head takes, but to be recorded: log S(y) [n] as the terms see it."""
        log_s = torch.log_softmax(self.cooled(logits["student"]), -1)
        return log_s.gather(-1, tokens.ids[:, None]).squeeze(-1), {}


@torch.no_grad()
def diagnose(log_p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is worth knowing whatever is optimised, in nats [n]; `log_p` maps "student" and others to [n, V]."""
    log_s = log_p["student"].detach()
    p_s = log_s.exp()
    stats = {"student_entropy": -expect(p_s, log_s)}
    if "teacher" in log_p:
        log_t = log_p["teacher"]
        p_t, gap = log_t.exp(), log_s - log_t
        stats["forward_kl"], stats["reverse_kl"] = -expect(p_t, gap), expect(p_s, gap)
        stats["teacher_entropy"] = -expect(p_t, log_t)
        stats["top1_agreement"] = top_agreement(log_s, log_t)
    if "reference" in log_p:
        stats["reference_kl"] = expect(p_s, log_s - log_p["reference"])
    return stats


def expect(p: Tensor, x: Tensor) -> Tensor:
    """sum_v p_v x_v, [n, V] each, where a token of probability 0 adds nothing even if its x is infinite."""
    value = torch.linalg.vecdot(p, x)
    if value.isnan().any():
        value = torch.where(p == 0, 0.0, p * x).sum(-1)
    return value
