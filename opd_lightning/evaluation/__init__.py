"""Evaluations: each is called as evaluation(student, teachers, generator) and returns an `Estimate` by name.

`examples` are those that it measures; only evaluations of equal examples can be compared. One with `ends_only` is run only
before and after training.
"""

from opd_lightning.evaluation.accuracy import GreedyAccuracy, SampledAccuracy
from opd_lightning.evaluation.answers import GreedyAnswers
from opd_lightning.evaluation.divergence import ReferenceLikelihood, StartDivergence, TeacherDivergence
from opd_lightning.evaluation.episodes import EpisodeAccuracy
from opd_lightning.evaluation.estimate import KINDS, Estimate, headlines, leading
from opd_lightning.evaluation.harness import HarnessTasks
from opd_lightning.evaluation.robustness import Perturbations, Robustness
from opd_lightning.evaluation.teacher_gap import TeacherAccuracy

__all__ = [
    "KINDS",
    "EpisodeAccuracy",
    "Estimate",
    "GreedyAccuracy",
    "GreedyAnswers",
    "HarnessTasks",
    "Perturbations",
    "ReferenceLikelihood",
    "Robustness",
    "SampledAccuracy",
    "StartDivergence",
    "TeacherAccuracy",
    "TeacherDivergence",
    "headlines",
    "leading",
]
