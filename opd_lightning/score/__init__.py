"""Scores of a teacher, written to files once: `python -m opd_lightning.score`."""
