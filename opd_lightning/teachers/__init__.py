"""Teachers: scorers of the student's tokens, each a `contracts.Teacher`."""

from opd_lightning.teachers.alignment import AlignedTeacher
from opd_lightning.teachers.base import BaseTeacher, Composite, SharedWeights
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.teachers.hidden import RemoteHiddenTeacher
from opd_lightning.teachers.local import LocalTeacher, average, external, frozen, live, trust_region
from opd_lightning.teachers.mixed import MixedTeacher
from opd_lightning.teachers.remote import RemoteTeacher
from opd_lightning.teachers.routed import RoutedTeacher
from opd_lightning.teachers.shuffled import ShuffledTeacher
from opd_lightning.teachers.topk import TopKTeacher

__all__ = [
    "AlignedTeacher",
    "BaseTeacher",
    "CachedTeacher",
    "Composite",
    "LocalTeacher",
    "MixedTeacher",
    "RemoteHiddenTeacher",
    "RemoteTeacher",
    "RoutedTeacher",
    "SharedWeights",
    "ShuffledTeacher",
    "TopKTeacher",
    "average",
    "external",
    "frozen",
    "live",
    "trust_region",
]
