"""Tasks: where prompts, reference completions and verdicts come from. README.md in this folder shows how to add one."""

from opd_lightning.tasks.base import Example, Task, Verdict
from opd_lightning.tasks.table import TableTask

__all__ = ["Example", "TableTask", "Task", "Verdict"]
