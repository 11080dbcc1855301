"""The ids that student and teacher share, where the student has words that a teacher lacks.

Such a teacher says nothing of these words: it does not give them probability 0, which would make the reverse KL infinite and a
bounded divergence pull the student away from its own tokens. So a divergence compares both distributions *given* that the
token is one that both have: restricted to the shared ids and renormalised, on either side. It has no gradient on the student's
mass outside of them, so that mass is logged (`unshared_mass`). Other terms see the student's whole distribution.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.types import Tokens
from opd_lightning.utils.vocabulary import Words


@dataclass(frozen=True)
class View:
    """The student and its tokens as a teacher's target can be compared with them.

    Attributes:
        log_s: log-probabilities [n, V] of the ids that the target covers, given that it is one of them.
        target: valid only where the written token is one of them.
        tokens: with ids among them. Ratios of old and new log-probabilities stay those of the student's whole distribution.
        log_mass [n]: log of the student's probability of the ids that are compared; None where these are all.
    """

    log_s: Tensor
    target: Any
    tokens: Tokens
    log_mass: Tensor | None = None

    def stats(self, name: str) -> dict[str, Tensor]:
        """The student's mass that is not compared."""
        if self.log_mass is None:
            return {}
        key = "unshared_mass" if name == "teacher" else f"{name}_unshared_mass"
        return {key: -torch.expm1(self.log_mass.clamp(max=0.0))}


def view(logits: Tensor, log_s: Tensor, target: Any, tokens: Tokens) -> View:
    """The student as a target as log-probabilities sees it, from its logits and log-probabilities, [n, V] each."""
    shared: Words | None = getattr(target, "shared", None)
    if shared is None:
        return View(log_s, target, tokens)
    log_mass = shared.cut(log_s.detach()).logsumexp(-1)
    known = shared.known(tokens.ids)
    target = replace(target, valid=known if target.valid is None else known & target.valid)
    old, sampler = (None if x is None else x - log_mass for x in (tokens.old_logprob, tokens.sampler_logprob))
    tokens = replace(tokens, ids=torch.where(known, tokens.ids, 0), old_logprob=old, sampler_logprob=sampler)
    return View(shared.cut(logits).log_softmax(-1), target, tokens, log_mass)
