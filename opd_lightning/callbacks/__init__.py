"""Callbacks: everything around the training step."""

from opd_lightning.callbacks.budget import Budget
from opd_lightning.callbacks.checkpoint import Checkpoint
from opd_lightning.callbacks.cost_ledger import CostLedger
from opd_lightning.callbacks.diagnostics import Diagnostics
from opd_lightning.callbacks.evaluation import Evaluation
from opd_lightning.callbacks.gradient_estimators import Estimators
from opd_lightning.callbacks.health_checks import HealthChecks
from opd_lightning.callbacks.progress import Progress
from opd_lightning.callbacks.samples import Samples

__all__ = [
    "Budget",
    "Checkpoint",
    "CostLedger",
    "Diagnostics",
    "Estimators",
    "Evaluation",
    "HealthChecks",
    "Progress",
    "Samples",
]
