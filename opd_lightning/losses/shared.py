"""The ids that student and teacher share, where the student has tokens that a teacher lacks.

Such a teacher has no target for these tokens. Probability 0 would make the reverse KL infinite, and a bounded divergence would
push the student away from its own tokens. So a divergence compares both distributions restricted to the shared ids and
renormalised. It has no gradient on the student's mass outside of them, so that mass is logged (`unshared_mass`). Other terms
use the student's full distribution. Targets over other outcomes than the student's tokens put the student on these, see
`aligned_targets.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.types import Tokens
from opd_lightning.utils.vocabulary import ValidIds


@dataclass(frozen=True)
class View:
    """The student's log-probabilities and tokens on the ids that a teacher's target covers.

    Attributes:
        log_s: log-probabilities [n, V] of the ids that the target covers, renormalised over them.
        target: valid only where the written token is one of them.
        tokens: with ids among them. Ratios of old and new log-probabilities stay those of the student's full distribution.
        log_mass [n]: log of the student's probability of the ids that are compared; None where all are.
    """

    log_s: Tensor
    target: Any
    tokens: Tokens
    log_mass: Tensor | None = None

    def stats(self, name: str) -> dict[str, Tensor]:
        """The student's probability mass outside the compared ids."""
        if self.log_mass is None:
            return {}
        key = "unshared_mass" if name == "teacher" else f"{name}_unshared_mass"
        return {key: -torch.expm1(self.log_mass.clamp(max=0.0))}


def view(logits: Tensor, log_s: Tensor, target: Any, tokens: Tokens) -> View:
    """The student on the ids of a target of log-probabilities, from its logits and log-probabilities, [n, V] each."""
    if (compared := getattr(target, "compared", None)) is not None:
        return View(*compared(log_s, tokens))
    shared: ValidIds | None = getattr(target, "shared", None)
    if shared is None:
        return View(log_s, target, tokens)
    log_mass = shared.cut(log_s.detach()).logsumexp(-1)
    covered = shared.contains(tokens.ids)
    target = replace(target, valid=covered if target.valid is None else covered & target.valid)
    old, sampler = (None if x is None else x - log_mass for x in (tokens.old_logprob, tokens.sampler_logprob))
    tokens = replace(tokens, ids=torch.where(covered, tokens.ids, 0), old_logprob=old, sampler_logprob=sampler)
    return View(shared.cut(logits).log_softmax(-1), target, tokens, log_mass)
