"""Gates: factors of each token's loss, from the scores of student and teacher, the verdict and the advantage.

A gate maps the student's log-probabilities [n, V], the targets by name and the tokens to a factor [n], or to factors by the
name of a term; terms that are not named keep their loss. It has no gradient and does not enter the normaliser. `reads_verdicts`
and `reads_teachers` say what it needs, if no term reads it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.schedules import TERMS
from opd_lightning.types import Tokens


def check_factors(place: str, factors: Mapping[str, float]) -> dict[str, float]:
    """Factors by term; raises ValueError for other terms, or a negative factor."""
    for name, value in factors.items():
        if name not in TERMS or isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"loss.gate.{place}.{name}={value!r}: give {', '.join(TERMS)} numbers that are not negative.")
    return {name: float(value) for name, value in factors.items()}


def chosen(condition: Tensor, yes: Mapping[str, float], no: Mapping[str, float], like: Tensor) -> dict[str, Tensor]:
    """The factors [n] by term of the tokens with the condition [n], and of those without."""
    one = torch.ones(condition.shape, dtype=like.dtype, device=like.device)
    names = sorted({*yes, *no})
    return {name: torch.where(condition, yes.get(name, 1.0) * one, no.get(name, 1.0) * one) for name in names}


class ByVerdict:
    """Factors of the terms where the answer is right, and where it is wrong.

    SRPO (arXiv 2604.02288) learns from its right answers by policy gradient and from its wrong ones by the teacher; SCOPE
    (2604.10688) imitates the right ones.

    Args:
        right, wrong: factors by term.
        untaught: factors where the answer is wrong and the teacher has no target, such as without a correct sibling; None
            takes those of `wrong`.
        solved: the smallest reward of a right answer.
    """

    reads_verdicts = True

    def __init__(
        self,
        right: dict[str, float],
        wrong: dict[str, float],
        untaught: dict[str, float] | None = None,
        solved: float = 1.0,
    ):
        self.right, self.wrong = check_factors("right", right), check_factors("wrong", wrong)
        self.untaught = self.wrong if untaught is None else check_factors("untaught", untaught)
        self.solved = solved

    def __call__(self, log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
        """Factors [n] by term."""
        assert tokens.reward is not None
        right = tokens.reward >= self.solved
        factors = chosen(right, self.right, self.wrong, log_s)
        valid = getattr(targets.get("teacher"), "valid", None)
        if valid is None or self.untaught is self.wrong:
            return factors
        other = chosen(right | valid, {}, self.untaught, log_s)
        return {
            name: torch.where(right | valid, factors.get(name, torch.ones_like(log_s[:, 0])), other.get(name, 1.0))
            for name in {*factors, *other}
        }


class ByPassRate:
    """Factors of the terms where the share of right completions of the prompt is at most `at_most`, and elsewhere.

    HDPO (arXiv 2603.23871) asks the teacher only where all completions fail, for these have no policy gradient.

    Args:
        below, above: factors by term.
        at_most: a mean reward; 0 takes the prompts that always fail.
    """

    reads_verdicts = True

    def __init__(self, below: dict[str, float], above: dict[str, float], at_most: float = 0.0):
        self.below, self.above, self.at_most = check_factors("below", below), check_factors("above", above), at_most

    def __call__(self, log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
        """Factors [n] by term."""
        assert tokens.pass_rate is not None
        return chosen(tokens.pass_rate <= self.at_most, self.below, self.above, log_s)


class BySource:
    """Factors of the terms on the student's own completions, and on those of others.

    With a rollout of both, such as GKD's mixture, a sampled divergence on the student's and cross-entropy on the others'.

    Args:
        own, others: factors by term.
    """

    def __init__(self, own: dict[str, float], others: dict[str, float]):
        self.own, self.others = check_factors("own", own), check_factors("others", others)

    def __call__(self, log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
        """Factors [n] by term."""
        own = torch.ones_like(tokens.weight, dtype=torch.bool) if tokens.own is None else tokens.own
        return chosen(own, self.own, self.others, log_s)


def log_ratio(log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens, to: str = "student") -> Tensor:
    """log T(y) - log S(y) [n] of the written token, 0 without a target; or to another reading, `to="reference"`."""
    target = targets["teacher"]
    base = targets["reference"] if to == "reference" else None
    ratio = target.of(tokens.ids) - (written(log_s, tokens) if base is None else base.of(tokens.ids))
    for valid in (target.valid, getattr(base, "valid", None)):
        ratio = ratio if valid is None else torch.where(valid, ratio, 0.0)
    return ratio


def written(log_s: Tensor, tokens: Tokens) -> Tensor:
    """log S(y) [n]."""
    return log_s.gather(-1, tokens.ids[:, None]).squeeze(-1)


class Confident:
    """sigmoid(slope (log T(y) - log S(y))) on a term: written tokens of which the teacher is surer than the student.

    SDAR (arXiv 2605.15155) adds cross-entropy on the student's own tokens to a policy gradient, behind this gate.

    Args:
        slope: 5 is SDAR's; the higher, the sharper.
        term: "divergence" or "cross_entropy".
    """

    reads_teachers = frozenset({"teacher"})

    def __init__(self, slope: float = 5.0, term: str = "divergence"):
        if not slope > 0:
            raise ValueError(f"loss.gate.slope={slope} must be positive; 5 is SDAR's.")
        check_factors("term", {term: 1.0})
        self.slope, self.term = slope, term

    def __call__(self, log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
        """The factor [n] of the term."""
        return {self.term: torch.sigmoid(self.slope * log_ratio(log_s, targets, tokens))}


class Evidence:
    """(1 - share) + share clip(exp(sign(A) (log T(y) - log S(y)))) on the policy gradient (RLSD, arXiv 2604.03128).

    The verdict says where to go and the teacher how far: the factor never changes the sign of the advantage A.

    Args:
        share: of the teacher in the factor; 0 is the policy gradient itself.
        clip: the exponential stays within 1 - clip and 1 + clip.
        wrong_only: leave positive advantages as they are.
        to: "student", or "reference" for the contrast of two readings, log T(y) - log R(y) (RLCSD's, arXiv 2606.11709).
    """

    def __init__(self, share: float = 0.5, clip: float = 0.2, wrong_only: bool = False, to: str = "student"):
        if not 0 <= share <= 1 or not 0 <= clip <= 1:
            raise ValueError(f"loss.gate.share={share} and clip={clip} must lie in [0, 1]; 0.5 and 0.2 are usual.")
        if to not in ("student", "reference"):
            raise ValueError(f"loss.gate.to={to!r} is unknown; choose student or reference.")
        self.share, self.clip, self.wrong_only, self.to = share, clip, wrong_only, to
        self.reads_teachers = frozenset({"teacher"} if to == "student" else {"teacher", "reference"})

    def __call__(self, log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
        """The factor [n] of the policy gradient."""
        assert tokens.advantage is not None, "loss.gate reads advantages, which a policy gradient has"
        ratio = log_ratio(log_s, targets, tokens, self.to)
        evidence = (tokens.advantage.sign() * ratio).exp().clamp(1 - self.clip, 1 + self.clip)
        factor = 1 - self.share + self.share * evidence
        return {"policy_gradient": torch.where(tokens.advantage > 0, 1.0, factor) if self.wrong_only else factor}


class Entropy:
    """1 where an entropy lies between two bounds, else 0, on every term.

    Args:
        of: "student" or "teacher"; the teacher has to give its whole vocabulary.
        least, most: nats; None sets no bound.
    """

    def __init__(self, of: str = "teacher", least: float | None = None, most: float | None = None):
        if of not in ("student", "teacher"):
            raise ValueError(f"loss.gate.of={of!r} is unknown; choose student or teacher.")
        if least is None and most is None:
            raise ValueError("loss.gate.least and most are null, so every token passes; set one.")
        self.of, self.least, self.most = of, least, most

    def __call__(self, log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> Tensor:
        """The factor [n]."""
        log_p = log_s if self.of == "student" else targets["teacher"].log_p
        entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
        inside = torch.ones_like(entropy, dtype=torch.bool)
        inside = inside if self.least is None else inside & (entropy >= self.least)
        return (inside if self.most is None else inside & (entropy <= self.most)).to(log_s.dtype)


def own_probability(log_s: Tensor, targets: Mapping[str, Any], tokens: Tokens) -> dict[str, Tensor]:
    """S(y) on the cross-entropy, without gradient (DFT, arXiv 2508.05629): unlikely references pull less."""
    return {"cross_entropy": written(log_s, tokens).exp()}
