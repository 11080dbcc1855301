"""Rollouts: who writes the completions. Each is called as rollout(student, prompts, seed) and returns a `Rollout`."""

from opd_lightning.rollout.dataset import DatasetRollout
from opd_lightning.rollout.student import StudentRollout

__all__ = ["DatasetRollout", "StudentRollout"]
