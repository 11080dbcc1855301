"""Evaluations: each is called as evaluation(student, scorers) and returns numbers by name."""

from opd_lightning.evaluation.accuracy import GreedyAccuracy
from opd_lightning.evaluation.answers import GreedyAnswers
from opd_lightning.evaluation.text import ReferenceLikelihood, TeacherDivergence

__all__ = ["GreedyAccuracy", "GreedyAnswers", "ReferenceLikelihood", "TeacherDivergence"]
