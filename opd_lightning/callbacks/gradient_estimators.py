"""How good are cheaper estimates of the gradient? The exact one beside top-k and sampled tokens, on a step's own batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from opd_lightning.data.batching import Batch
from opd_lightning.losses.head import head_loss
from opd_lightning.losses.shared import view
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.types import Tokens
from opd_lightning.utils.seeds import derive_seed, seeded


class Estimators(L.Callback):
    """Compares gradients with respect to the student's hidden states, which is what the backbone learns from.

    For each estimator: `cosine` and `relative_error` to the exact gradient of the run's divergence; for sampled tokens also
    `variance` over fresh draws (mean squared deviation from the exact gradient over its squared norm) and `squared_bias` (the
    mean product of two different draws' deviations, which is zero on average for an unbiased estimate and can be negative);
    for top-k, which is all bias and no variance, the probability outside of it.

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

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: object) -> None:
        """Compare on the batch that was just learned from, at the weights of now."""
        batch = outputs["batch"]
        if trainer.global_step % self.every or batch.skip_update or "full" not in self.known(module, batch):
            return
        numbers = self.compare(module, batch, derive_seed(module.seed, "estimators", trainer.global_step))
        for logger in trainer.loggers:
            logger.log_metrics({f"estimators/{name}": value for name, value in numbers.items()}, step=trainer.global_step)

    @staticmethod
    def known(module: Any, batch: Batch) -> frozenset[str]:
        """What the batch's teacher provides; nothing without one."""
        return module.teachers["teacher"].provides if "teacher" in batch.scores else frozenset()

    def compare(self, module: Any, batch: Batch, seed: int) -> dict[str, float]:
        """The panel's numbers by name."""
        sequences, tokens, scores = batch.micro(batch.active[: self.rows], module.renderer.tokenizer.pad_token_id)
        with module.student.evaluating():
            hidden = module.student.hidden(sequences)
        divergence, temperature = module.objective.divergence.divergence, module.objective.temperature
        vocabulary = min(score.vocabulary for score in scores.values())

        def gradient(support: Any, draw: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
            """The gradient [N, H] by one estimator, and what the support tells of itself."""

            def loss(logits: Tensor, targets: Mapping[str, Any], some: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
                cooled = logits / temperature
                seen = view(cooled, cooled.log_softmax(-1), targets["teacher"].log_probs(temperature), some)
                if draw:
                    some = Tokens(torch.multinomial(seen.log_s.detach().exp(), 1).squeeze(1), some.position, some.weight)
                return support(divergence, seen.log_s, seen.target, some), support.describe(seen.log_s, seen.target)

            leaf = hidden.detach().requires_grad_()
            total, stats = head_loss(leaf, module.student.head, tokens, {"teacher": scores["teacher"]}, loss, module.chunk)
            (slope,) = torch.autograd.grad(total, leaf)
            return slope, stats

        exact, _ = gradient(FullVocabulary())
        numbers: dict[str, float] = {}
        for k in (k for k in self.ks if k < vocabulary):
            found, stats = gradient(TopK(k))
            numbers |= {f"top{k}/{name}": value for name, value in closeness(found, exact).items()}
            numbers[f"top{k}/teacher_tail_mass"] = stats["teacher_tail_mass"].mean().item()
        with seeded(seed, hidden.device):
            for name, support in (("sampled", SampledToken()), ("sampled_baseline", SampledToken(baseline=True))):
                draws = [gradient(support, draw=True)[0] for _ in range(self.draws)]
                numbers |= {
                    f"{name}/{key}": value for key, value in (closeness(draws[0], exact) | scatter(draws, exact)).items()
                }
        return numbers


def scatter(draws: Sequence[Tensor], exact: Tensor) -> dict[str, float]:
    """Variance and squared bias of draws of one estimate, both over the squared norm of the exact gradient."""
    away = (torch.stack(list(draws)) - exact).double() / exact.norm().clamp_min(1e-30)
    alone, n = away.square().sum(), len(draws)
    told = {"variance": (alone / n).item()}
    if n > 1:
        # A draw's product with itself is variance too; with another one's, whatever both have in common: bias.
        told["squared_bias"] = ((away.sum(0).square().sum() - alone) / (n * (n - 1))).item()
    return told


def closeness(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine and relative error of a gradient to the exact one."""
    cosine = torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    return {"cosine": cosine.item(), "relative_error": ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()}
