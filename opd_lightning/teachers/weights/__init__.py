"""Weights policies of local teachers."""

from opd_lightning.teachers.weights.average import Average
from opd_lightning.teachers.weights.base import Parameters, Weights
from opd_lightning.teachers.weights.external import External
from opd_lightning.teachers.weights.frozen import FrozenStart
from opd_lightning.teachers.weights.moving import Live, TrustRegion

__all__ = ["Average", "External", "FrozenStart", "Live", "Parameters", "TrustRegion", "Weights"]
