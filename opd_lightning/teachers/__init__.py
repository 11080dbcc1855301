"""Teachers: whose weights score the student's completions (`weights.py`), and behind which prompt (`scorer.py`)."""

from opd_lightning.teachers.local import Scorer
from opd_lightning.teachers.weights import Average, External, FrozenStart, Live, TrustRegion

__all__ = ["Average", "External", "FrozenStart", "Live", "Scorer", "TrustRegion"]
