"""Teachers: whose weights score the student's completions (`weights.py`), and behind which prompt (`scorer.py`)."""

from opd_lightning.teacher.scorer import Scorer
from opd_lightning.teacher.weights import Average, External, FrozenStart, Live, TrustRegion

__all__ = ["Average", "External", "FrozenStart", "Live", "Scorer", "TrustRegion"]
