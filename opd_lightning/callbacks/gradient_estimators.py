"""Estimators: compares gradient estimates from top-k and sampled tokens with the exact gradient, on a step's batch."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from opd_lightning.data.batching import Batch
from opd_lightning.losses.divergence_term import is_elementwise
from opd_lightning.losses.head import head_loss
from opd_lightning.losses.shared import view
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.types import Tokens
from opd_lightning.utils.seeds import derive_seed, seeded

log = logging.getLogger(__name__)


class Estimators(L.Callback):
    """Compares gradients with respect to the student's hidden states.

    For each estimator: `cosine` and `relative_error` to the exact gradient of the run's divergence; for sampled tokens also
    `variance` over fresh draws (mean squared deviation from the exact gradient over its squared norm) and `squared_bias` (the
    mean product of two different draws' deviations, which is zero on average for an unbiased estimate and can be negative);
    for top-k, which is biased and has no variance, the probability outside of it.

    Sampled tokens are left out where the divergence is no sum of entries that follow from one token each, and nothing is
    compared where there is no exact gradient over tokens; a sentence says so before training.

    Args:
        every: optimizer steps between comparisons.
        ks: sizes of the teacher's top k, with a tail.
        draws: fresh samples per token, for the variance and, if there are two or more, the bias.
        rows: completions to compare on; the first of the batch.
    """

    def __init__(self, every: int = 25, ks: Sequence[int] = (1, 4, 16), draws: int = 8, rows: int = 8):
        if every < 1 or draws < 1 or rows < 1 or any(k < 1 for k in ks):
            raise ValueError(
                f"callbacks.estimators: every={every}, draws={draws}, rows={rows}, ks={list(ks)} must be at least 1."
            )
        self.every, self.ks, self.draws, self.rows = every, ks, draws, rows

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Say what is left out, and why."""
        if reason := self.left_out(module):
            log.warning(f"warning: callbacks.estimators compares nothing: {reason}.")
        elif not is_elementwise(module.objective.divergence.divergence):
            log.warning(
                "warning: callbacks.estimators leaves sampled tokens out: loss.divergence is no sum of entries that follow "
                "from one token each, so a token estimates none of it."
            )

    @staticmethod
    def left_out(module: Any) -> str | None:
        """Why there is nothing to compare; None where there is."""
        if module.objective.divergence is None:
            return "the loss has no divergence"
        teacher = module.teachers["teacher"]
        if "full" not in teacher.provides:
            return "the exact gradient needs the teacher's whole vocabulary"
        if any(not getattr(part.alignment, "names_tokens", True) for part in teacher.parts if part.aligned):
            return "teacher.alignment compares probabilities by rank, which neither the top k nor a sampled token estimates"
        return None

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: object) -> None:
        """Compare on the step's batch, at the current weights."""
        batch = outputs["batch"]
        if trainer.global_step % self.every or batch.skip_update or self.left_out(module):
            return
        numbers = self.compare(module, batch, derive_seed(module.seed, "estimators", trainer.global_step))
        for logger in trainer.loggers:
            logger.log_metrics({f"estimators/{name}": value for name, value in numbers.items()}, step=trainer.global_step)

    def compare(self, module: Any, batch: Batch, seed: int) -> dict[str, float]:
        """The numbers of all estimators, by name."""
        sequences, tokens, scores = batch.micro(batch.active[: self.rows], module.renderer.tokenizer.pad_token_id)
        with module.student.eval_mode():
            hidden = module.student.hidden(sequences)
        divergence, temperature = module.objective.divergence.divergence, module.objective.temperature
        outcomes: set[int] = set()

        def gradient(support: Any, draw: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
            """The gradient [N, H] by one estimator, and the statistics of its support."""

            def loss(logits: Tensor, targets: Mapping[str, Any], rows: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
                scaled = logits / temperature
                seen = view(scaled, scaled.log_softmax(-1), targets["teacher"].log_probs(temperature), rows)
                outcomes.add(seen.log_s.shape[-1])  # with another tokenizer fewer than tokens
                if draw:
                    rows = Tokens(torch.multinomial(seen.log_s.detach().exp(), 1).squeeze(1), rows.position, rows.weight)
                value, valid = support(divergence, seen.log_s, seen.target, rows), seen.target.valid
                value = value if valid is None else torch.where(valid, value, 0.0)
                return value, support.describe(seen.log_s, seen.target)

            leaf = hidden.detach().requires_grad_()
            total, stats = head_loss(leaf, module.student.head, tokens, {"teacher": scores["teacher"]}, loss, module.chunk)
            (grad,) = torch.autograd.grad(total, leaf)
            return grad, stats

        exact, _ = gradient(FullVocabulary())
        numbers: dict[str, float] = {}
        for k in (k for k in self.ks if k < min(outcomes)):
            estimate, stats = gradient(TopK(k))
            numbers |= {f"top{k}/{name}": value for name, value in closeness(estimate, exact).items()}
            numbers[f"top{k}/teacher_tail_mass"] = stats["teacher_tail_mass"].mean().item()
        if not is_elementwise(divergence):
            return numbers
        with seeded(seed, hidden.device):
            for name, support in (("sampled", SampledToken()), ("sampled_baseline", SampledToken(baseline=True))):
                draws = [gradient(support, draw=True)[0] for _ in range(self.draws)]
                numbers |= {
                    f"{name}/{key}": value for key, value in (closeness(draws[0], exact) | scatter(draws, exact)).items()
                }
        return numbers


def scatter(draws: Sequence[Tensor], exact: Tensor) -> dict[str, float]:
    """Variance and squared bias of draws of one estimate, both over the squared norm of the exact gradient."""
    deviations = (torch.stack(list(draws)) - exact).double() / exact.norm().clamp_min(1e-30)
    squares, n = deviations.square().sum(), len(draws)
    numbers = {"variance": (squares / n).item()}
    if n > 1:
        # Products of different draws estimate the squared bias; a draw's product with itself has the variance in it too.
        numbers["squared_bias"] = ((deviations.sum(0).square().sum() - squares) / (n * (n - 1))).item()
    return numbers


def closeness(estimate: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine and relative error of a gradient to the exact one."""
    cosine = torch.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0)
    return {"cosine": cosine.item(), "relative_error": ((estimate - exact).norm() / exact.norm().clamp_min(1e-30)).item()}
