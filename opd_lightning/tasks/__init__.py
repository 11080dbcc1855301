"""Tasks: where prompts, reference completions and verdicts come from."""

from opd_lightning.tasks.base import Example, Task, Verdict

__all__ = ["Example", "Task", "Verdict"]
