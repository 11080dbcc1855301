"""Rollouts: who writes the completions. `contracts.RolloutPolicy` is what each offers."""

from opd_lightning.rollout.dataset import DatasetRollout
from opd_lightning.rollout.mixture import MixtureRollout
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.rollout.teacher import TeacherRollout

__all__ = ["DatasetRollout", "MixtureRollout", "StudentRollout", "TeacherRollout"]
