"""Tasks: sources of prompts, reference completions and verdicts. README.md in this folder shows how to add one."""

from opd_lightning.contracts import Task
from opd_lightning.tasks.table import TableTask
from opd_lightning.types import Example, Verdict

__all__ = ["Example", "TableTask", "Task", "Verdict"]
