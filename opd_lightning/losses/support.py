"""Supports: over which tokens of the vocabulary a divergence is taken."""

import torch
from torch import Tensor

from opd_lightning.types import Tokens

# A divergence maps log-probabilities (student [n, V], teacher [n, V]) to entries [n, V]; see divergence.py.


class FullVocabulary:
    """The exact divergence: the sum of its entries over the whole vocabulary."""

    needs_own_samples = False

    def __call__(self, divergence, log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
        """log_s, log_t: [n, V] log-probabilities. Returns the divergence [n]."""
        return divergence(log_s, log_t).sum(-1)


class SampledToken:
    """The estimate from the sampled token alone, in policy-gradient form (Thinking Machines, "On-Policy Distillation").

    For any D = sum_v f(log S, log T) the gradient is E_{y~S}[ c(y) grad log S(y) ] with c = (df / dlog S) / S, so the
    per-token loss is sg[c(y)] log S(y). c is shifted to 0 at S = T, a constant baseline that keeps the gradient
    unbiased; for reverse KL this gives c = log S - log T, the usual negative advantage. From the second update on one
    rollout the tokens are samples of an older policy, which the importance ratio S / S_old corrects per token. The value
    of the loss is no estimate of the divergence; read the logged KLs instead.
    """

    needs_own_samples = True

    def __call__(self, divergence, log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
        """log_s, log_t: [n, V] log-probabilities. Returns the surrogate [n], whose gradient is the estimate's."""
        token = tokens.ids[:, None]
        log_s, log_t = log_s.gather(-1, token).squeeze(-1), log_t.gather(-1, token).squeeze(-1)
        cost = self.coefficient(divergence, log_s, log_t) - self.coefficient(divergence, log_s, log_s)
        ratio = 1.0 if tokens.old_logprob is None else (log_s.detach() - tokens.old_logprob).exp()
        return ratio * cost * log_s

    @staticmethod
    def coefficient(divergence, log_s: Tensor, log_t: Tensor) -> Tensor:
        """(df / dlog S) / S at the given log-probabilities [n], by differentiating the divergence's entries."""
        with torch.enable_grad():
            leaf = log_s.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(divergence(leaf, log_t.detach()).sum(), leaf)
        return slope / leaf.detach().exp()
