"""Contexts: builders of the teacher's prompt, with information beside the student's prompt."""

from opd_lightning.teachers.contexts.builders import Feedback, FirstOf, NoContext, PrivilegedContext, Rule, Sibling

__all__ = ["Feedback", "FirstOf", "NoContext", "PrivilegedContext", "Rule", "Sibling"]
