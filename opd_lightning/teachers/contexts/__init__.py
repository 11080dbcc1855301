"""Contexts: what the teacher is shown beside the student's prompt."""

from opd_lightning.teachers.contexts.builders import Feedback, FirstOf, NoContext, Quote, Rule, Sibling

__all__ = ["Feedback", "FirstOf", "NoContext", "Quote", "Rule", "Sibling"]
