"""Losses that are NaN or infinite: which term it is, why, and what helps."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

REMEDIES = {
    "divergence": "Take a divergence that is finite there (loss/divergence=jsd).",
    "reference": "Take reference=start, or leave the reference out (loss/reference=none).",
    "policy_gradient": "Take the mask off the student's logits, or sample with it.",
    "cross_entropy": "Take the mask off the student's logits, or leave examples with such tokens out.",
}
"""What helps where a term of the objective is infinite."""


class NotFinite(ValueError):
    """A loss is NaN or infinite."""


def reason(stats: Mapping[str, Tensor], weight: Tensor, terms: Iterable[str]) -> str:
    """What to say of a loss that is not finite.

    Args:
        stats [N]: the loss and the statistics of every token.
        weight [N]: of the tokens.
        terms: of the objective.
    """
    loss = stats["loss"]
    wrong = ~torch.isfinite(loss) & (weight != 0)
    said = f"the loss of {int(wrong.sum())} of {len(loss)} tokens is not finite: "
    entropies = [stats[name] for name in ("student_entropy", "teacher_entropy") if name in stats] or [loss]
    if not wrong.any() or any(x[wrong].isnan().any() for x in entropies):
        return said + (
            "the weights or the logits of student or teacher are NaN or infinite. Go back to an earlier checkpoint, and lower "
            "optim.lr or optim.clip_norm."
        )
    known = [name for name in REMEDIES if name in set(terms)]
    guilty = [name for name in known if not torch.isfinite(stats.get(f"{name}_loss", loss)[wrong]).all()]
    return said + (
        "it is infinite, for one side gives no probability (logits of -inf) to what the other does not rule out: the forward "
        "KL and the cross-entropy need the student's probability, the reverse KL the teacher's. "
        + " ".join(REMEDIES[name] for name in guilty or ["divergence"])
    )
