"""Rollouts: sources of completions, each a `contracts.RolloutPolicy`."""

from opd_lightning.rollout.dataset import DatasetRollout
from opd_lightning.rollout.mixture import MixtureRollout
from opd_lightning.rollout.recorded import RecordedRollout
from opd_lightning.rollout.speculative import SpeculativeRollout
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.rollout.teacher import TeacherRollout

__all__ = ["DatasetRollout", "MixtureRollout", "RecordedRollout", "SpeculativeRollout", "StudentRollout", "TeacherRollout"]
