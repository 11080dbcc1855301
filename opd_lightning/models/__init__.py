"""Models: pretrained weights, the student as a module, adapters, sharding, FLOPs and the optimizer."""

from opd_lightning.models.frozen import Frozen
from opd_lightning.models.in_memory import InMemory
from opd_lightning.models.pretrained import Pretrained, is_run, locate
from opd_lightning.models.student import Student

__all__ = ["Frozen", "InMemory", "Pretrained", "Student", "is_run", "locate"]
