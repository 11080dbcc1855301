"""Losses that are NaN or infinite: the term, the reason and the remedy."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

REMEDIES = {
    "divergence": "Take a divergence that is finite there (loss/divergence=jsd).",
    "reference": "Take reference=start, or leave the reference out (loss/reference=none).",
    "policy_gradient": "Take the mask off the student's logits, or sample with it.",
    "cross_entropy": "Take the mask off the student's logits, or leave examples with such tokens out.",
}
"""The remedy for an infinite term of the objective."""


class NotFinite(ValueError):
    """A loss is NaN or infinite."""


def reason(stats: Mapping[str, Tensor], weight: Tensor, terms: Iterable[str]) -> str:
    """The error message for a loss that is not finite.

    Args:
        stats [N]: the loss and the statistics of every token.
        weight [N]: loss weights of the tokens.
        terms: names of the objective's terms.
    """
    loss = stats["loss"]
    wrong = ~torch.isfinite(loss) & (weight != 0)
    message = f"the loss of {int(wrong.sum())} of {len(loss)} tokens is not finite: "
    entropies = [stats[name] for name in ("student_entropy", "teacher_entropy") if name in stats] or [loss]
    if not wrong.any() or any(x[wrong].isnan().any() for x in entropies):
        return message + (
            "the weights or the logits of student or teacher are NaN or infinite. Go back to an earlier checkpoint, and lower "
            "optim.lr or optim.clip_norm."
        )
    active = [name for name in REMEDIES if name in set(terms)]
    infinite = [name for name in active if not torch.isfinite(stats.get(f"{name}_loss", loss)[wrong]).all()]
    return message + (
        "it is infinite, for one side gives no probability (logits of -inf) to what the other does not rule out: the forward "
        "KL and the cross-entropy need the student's probability, the reverse KL the teacher's. "
        + " ".join(REMEDIES[name] for name in infinite or ["divergence"])
    )
