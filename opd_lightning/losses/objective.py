"""The objective: a sum of per-token terms on chunks of logits, with its token weights and its normaliser."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Provides
from opd_lightning.losses.closed_form import Scratch, beta_of, generalised_jsd
from opd_lightning.losses.diagnostics import diagnose_views, where_valid
from opd_lightning.losses.divergence_term import DivergenceTerm, Entries
from opd_lightning.losses.policy_gradient import CrossEntropy, PolicyGradient, Unlikelihood
from opd_lightning.losses.returns import Returns
from opd_lightning.losses.schedules import TERMS, Schedule, check_coefficients, value_at
from opd_lightning.losses.shared import View, view
from opd_lightning.losses.targets import FullLogits
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.types import Tokens

Gate = Callable[[Tensor, Mapping[str, Any], Tokens], Tensor | Mapping[str, Tensor]]
"""A factor [n] of each token's loss, or factors by term; see `gates.py`."""


class Objective:
    """The objective of a method: sum over tokens of weight x (sum over terms of coefficient x term) / Z.

    Args:
        weight: which tokens count; see `token_weights.py`.
        aggregate: what the sum is divided by; see `token_weights.py`.
        divergence: a divergence from the teacher; None has none.
        vocab_support: over which tokens that divergence is taken; see `vocab_support.py`.
        policy_gradient: a term on rewarded completions; None has none.
        cross_entropy: a term on the written tokens.
        reference: a divergence from a reference model, over the whole vocabulary; None has none.
        coefficients: of the terms "divergence", "policy_gradient", "cross_entropy" and "reference"; 1 unless given, and
            0 drops the term. A schedule of the optimizer step, see `schedules.py`, may stand in place of a number.
        clip: bounds the divergence, see `clip.py`; None does not.
        ratio_cap: multiply the divergence by min(S / S_old, cap) of the written token from the second update on one rollout
            on (SDPO, arXiv 2601.20802); None does not. A sampled token has its own ratio.
        temperature: divides all logits in every term and every logged KL; normally equal to the sampling
            temperature.
        temperature_squared: multiply the divergence by temperature^2, so that its gradients keep their size (Hinton et al.
            2015, arXiv 1503.02531, section 2).
        gate: a factor of each token's loss, from student, teacher, reward and advantage; None does not. It does not enter Z.
        returns: make each token answer for the divergences behind it, see `returns.py`; None does not.

    Raises:
        ValueError: no term at all, a coefficient of no term or a negative one, a temperature that is not positive, a clip or
            a divergence that the support does not allow.

    With two reverse KLs the reference's coefficient may be negative, as long as both add up to more than 0:
    a KL(S || T) - b KL(S || R) = (a - b) KL(S || M) + constant, with M proportional to (T^a / R^b)^(1 / (a - b)), which goes
    beyond the teacher (G-OPD, arXiv 2602.12125: a is its lambda > 1, and b = lambda - 1).
    """

    TERMS = TERMS

    def __init__(
        self,
        weight: Callable[[Tokens], Tensor],
        aggregate: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        divergence: Entries | None = None,
        vocab_support: Any = None,
        policy_gradient: PolicyGradient | None = None,
        cross_entropy: CrossEntropy | Unlikelihood | None = None,
        reference: Entries | None = None,
        clip: Any = None,
        ratio_cap: float | None = None,
        coefficients: Mapping[str, float | Schedule] | None = None,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        gate: Gate | None = None,
        returns: Returns | None = None,
    ):
        self.schedules: dict[str, float | Schedule] = {**dict.fromkeys(self.TERMS, 1.0), **(coefficients or {})}
        check_coefficients(self.schedules, beyond=beta_of(divergence) == beta_of(reference) == 1)
        off = {name for name, value in self.schedules.items() if value == 0}
        divergence = None if "divergence" in off else divergence
        policy_gradient = None if "policy_gradient" in off else policy_gradient
        cross_entropy = None if "cross_entropy" in off else cross_entropy
        reference = None if "reference" in off else reference
        if divergence is None and policy_gradient is None and cross_entropy is None:
            raise ValueError("the loss has no term: choose loss/divergence=, loss/policy_gradient= or loss/cross_entropy=.")
        if not temperature > 0:
            raise ValueError(f"loss.temperature={temperature} must be positive; 1.0 is the models' own distribution.")
        self.weight, self.aggregate, self.temperature, self.gate = weight, aggregate, temperature, gate
        scale = temperature**2 if temperature_squared else 1.0
        self.divergence = (
            None if divergence is None else DivergenceTerm(divergence, vocab_support, clip, ratio_cap, scale, returns)
        )
        self.policy_gradient, self.cross_entropy, self.reference = policy_gradient, cross_entropy, reference
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Take the scheduled numbers of an optimizer step."""
        self.coefficients = {name: value_at(number, step) for name, number in self.schedules.items()}
        if self.divergence is not None and hasattr(self.divergence.divergence, "set_step"):
            self.divergence.divergence.set_step(step)

    @property
    def scheduled(self) -> dict[str, float]:
        """The numbers that follow a schedule, at this step."""
        names = [name for name, number in self.schedules.items() if callable(number)]
        found = {f"{name}_coefficient": self.coefficients[name] for name in names}
        share = getattr(getattr(self.divergence, "divergence", None), "now", None)
        return found if share is None else found | {"interpolation_share": share}

    @property
    def functions(self) -> list[Any]:
        """Gate and token weight, a partial as its function."""
        return [getattr(part, "func", part) for part in (self.gate, self.weight)]

    @property
    def teachers(self) -> frozenset[str]:
        """Names of the teachers that the terms read, and a gate or weight whose function names them in `reads_teachers`."""
        read = {"teacher": self.divergence, "reference": self.reference}
        others = {name for function in self.functions for name in getattr(function, "reads_teachers", ())}
        return frozenset(name for name, term in read.items() if term is not None or name in others)

    @property
    def requires(self) -> dict[str, Provides]:
        """The kind of targets that each of these teachers has to provide."""
        needs: dict[str, Provides] = {"reference": "full"} if "reference" in self.teachers else {}
        return needs if self.divergence is None else needs | {"teacher": self.divergence.support.requires}

    @property
    def terms(self) -> set[str]:
        """Names of the terms of this objective."""
        return {name for name in self.TERMS if getattr(self, name) is not None}

    @property
    def rewarded(self) -> bool:
        """Whether a term reads rewards."""
        return self.policy_gradient is not None

    @property
    def reads_verdicts(self) -> bool:
        """Whether a term reads rewards, or a gate or token weight has a function with `reads_verdicts`."""
        return self.rewarded or any(getattr(function, "reads_verdicts", False) for function in self.functions)

    @property
    def weighs_verdicts(self) -> bool:
        """Whether token weights follow from verdicts, so that some rollouts may have none."""
        return getattr(self.functions[1], "reads_verdicts", False)

    @property
    def reads_scores(self) -> bool:
        """Whether weight or returns need statistics of the whole batch before its first update."""
        returns = self.divergence is not None and self.divergence.returns is not None
        return returns or any(getattr(function, "reads_scores", False) for function in self.functions)

    @property
    def compares_updates(self) -> bool:
        """Whether a term reads log-probabilities from before the first update on a rollout."""
        own = any(term is not None and term.needs_own_samples for term in (self.divergence, self.cross_entropy))
        return self.rewarded or own or (self.divergence is not None and self.divergence.ratio_cap is not None)

    def weights(self, tokens: Tokens, samples: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token weights [N] and this device's share of the normaliser Z.

        Args:
            tokens: with weight 1 where a token may count.
            samples: B.
            valid [N]: where the teacher has a target; without one, a token's weight is 0 if the divergence is the only term.
        """
        if self.terms == {"divergence"}:
            assert self.divergence is not None
            for has_target in (valid, tokens.own if self.divergence.needs_own_samples else None):
                if has_target is not None:
                    tokens = replace(tokens, weight=tokens.weight * has_target)
        assert tokens.sample is not None
        return self.aggregate(self.weight(tokens), tokens.sample, samples)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [P, G] from the rewards [P, G] of the whole batch: P prompts, G samples each."""
        assert self.policy_gradient is not None
        return self.policy_gradient.advantage(rewards)

    def active(self, tokens: Tokens, valid: Tensor | None) -> Tensor:
        """Number of tokens that can have a gradient; an advantage of 0 and a missing target [N] give none."""
        signal = torch.full_like(tokens.weight, bool(self.terms & {"cross_entropy", "reference"})).bool()
        if self.divergence is not None:
            signal = signal | (torch.ones_like(signal) if valid is None else valid)
        if tokens.advantage is not None:
            signal = signal | (tokens.advantage != 0)
        return ((tokens.weight > 0) & signal).sum()

    def __call__(self, logits: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The per-token loss of a chunk.

        Args:
            logits: the student's, [n, V] in at least float32.
            targets: of each of `teachers`.
            tokens: the chunk's n tokens.

        Returns:
            The loss [n], and statistics [n] that carry no gradient: KLs in both directions, entropies, agreement, and
            each term where there are several.
        """
        logits = self.apply_temperature(logits)
        log_s = torch.log_softmax(logits, -1)
        views = {name: view(logits, log_s, target.log_probs(self.temperature), tokens) for name, target in targets.items()}
        log_targets = {name: seen.target for name, seen in views.items()}
        stats = diagnose_views(log_s, views, tokens)
        terms: dict[str, Tensor] = {}
        if self.divergence is not None:
            own, target = views["teacher"], log_targets["teacher"]
            terms["divergence"], extra = self.divergence(own.log_s, target, own.tokens)
            stats |= extra
            stats = where_valid(stats, target)
        if self.policy_gradient is not None:
            terms["policy_gradient"], extra = self.policy_gradient(log_s, tokens)
            stats |= extra
        if self.cross_entropy is not None:
            terms["cross_entropy"], extra = self.cross_entropy(log_s, tokens)
            stats |= extra
        if self.reference is not None:
            seen, valid = views["reference"], log_targets["reference"].valid
            value = self.reference(seen.log_s, log_targets["reference"].log_p).sum(-1)
            terms["reference"] = value if valid is None else torch.where(valid, value, 0.0)
        if len(terms) > 1:
            stats |= {f"{name}_loss": value.detach() for name, value in terms.items()}
        gate = self.gates(log_s, views, tokens)
        if isinstance(gate, Mapping):
            terms |= {name: terms[name] * factor for name, factor in gate.items() if name in terms}
            stats |= {f"{name}_gate": factor for name, factor in gate.items() if name in terms}
        loss = torch.stack([self.coefficients[name] * value for name, value in terms.items()]).sum(0)
        return (loss * gate, stats | {"gate": gate}) if isinstance(gate, Tensor) else (loss, stats)

    @torch.no_grad()
    def gates(self, log_s: Tensor, views: Mapping[str, View], tokens: Tokens) -> Tensor | Mapping[str, Tensor] | None:
        """The gate's factors of a chunk: [n], or by term; None without a gate."""
        if self.gate is None:
            return None
        own = views.get("teacher")
        if own is not None:
            log_s, tokens = own.log_s, own.tokens
        return self.gate(log_s.detach(), {name: seen.target for name, seen in views.items()}, tokens)

    def observe(self, logits: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log S(y) [n] and the statistics of student and teacher that weights read, in the form of a loss for the head."""
        logits = self.apply_temperature(logits)
        log_s = torch.log_softmax(logits, -1)
        views = {name: view(logits, log_s, target.log_probs(self.temperature), tokens) for name, target in targets.items()}
        stats = diagnose_views(log_s, views, tokens)
        if "teacher" in views:
            own = views["teacher"]
            stats["teacher_logprob"] = own.target.of(own.tokens.ids)
            if self.divergence is not None and self.divergence.returns is not None:
                stats["cost"] = self.divergence.cost(own.log_s, own.target, own.tokens)
            stats = where_valid(stats, own.target)
        logprob = log_s.gather(-1, tokens.ids[:, None]).squeeze(-1)
        return logprob, stats | {"student_logprob": logprob}

    def with_returns(self, tokens: Tokens) -> Tokens:
        """The tokens [N] of a whole batch with what lies behind each, from the statistics in `seen`."""
        if self.divergence is None or self.divergence.returns is None:
            return tokens
        assert tokens.seen is not None
        counted = (tokens.weight > 0) & (True if tokens.own is None else tokens.own)
        return replace(
            tokens, future=self.divergence.returns(torch.where(counted, tokens.seen["cost"].nan_to_num(0.0), 0.0), tokens)
        )

    def apply_temperature(self, logits: Tensor) -> Tensor:
        """Logits divided by the temperature; the same tensor if that is 1."""
        return logits if self.temperature == 1.0 else logits / self.temperature

    def closed_form(
        self, logits: Tensor, targets: Mapping[str, Any], tokens: Tokens, scratch: Scratch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """The loss [n], its gradient [n, V] and the statistics, without autograd; None if there is no closed form.

        One exact divergence of the three common ones has one, without other terms. The logits are overwritten.
        """
        term = self.divergence
        if term is None or self.terms != {"divergence"} or self.gate is not None:
            return None
        if not isinstance(targets["teacher"], FullLogits) or targets["teacher"].shared is not None:
            return None
        beta = beta_of(term.divergence)
        plain = term.clip is None and term.ratio_cap is None and term.returns is None
        if beta is None or not isinstance(term.support, FullVocabulary) or not plain:
            return None
        s, t = logits, targets["teacher"].logits
        if self.temperature != 1.0:
            s, t = s.div_(self.temperature), t.div_(self.temperature)
        value, grad, stats = generalised_jsd(s, t, beta, scratch)
        factor = self.coefficients["divergence"] * term.scale
        if factor / self.temperature != 1.0:
            grad.mul_(factor / self.temperature)
        return factor * value, grad, stats

    def log_prob(self, logits: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """log S(y) [n] at the objective's temperature, in the form of a loss for the head."""
        log_s = torch.log_softmax(self.apply_temperature(logits), -1)
        return log_s.gather(-1, tokens.ids[:, None]).squeeze(-1), {}
