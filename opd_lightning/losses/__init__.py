"""Losses: per-token terms on chunks of logits, and the head that applies them within a memory bound."""

from opd_lightning.losses.head import Head, head_loss
from opd_lightning.losses.objective import Objective

__all__ = ["Head", "Objective", "head_loss"]
