"""Contexts: what a teacher is shown beside the student's prompt. Each is called as context(example) and returns a chat."""

from opd_lightning.context.builders import Demonstration, NoContext

__all__ = ["Demonstration", "NoContext"]
