"""Teachers with another tokenizer than the student's; see `readings.py` for what can be learned from them."""

from opd_lightning.teachers.alignment.readings import ALIGNMENTS, SharedVocabulary, SortedProbabilities, Spans
from opd_lightning.teachers.alignment.teacher import AlignedTeacher, aligned

__all__ = ["ALIGNMENTS", "AlignedTeacher", "SharedVocabulary", "SortedProbabilities", "Spans", "aligned"]
