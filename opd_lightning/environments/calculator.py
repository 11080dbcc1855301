"""Calculator: an example of two turns; it evaluates the first reply, and the task judges the second."""

import ast
import operator
from collections.abc import Callable
from functools import partial

from opd_lightning.contracts import Task
from opd_lightning.types import Example, Messages, Verdict

OPERATORS: dict[type, Callable[[int, int], int]] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class Calculator:
    """Answers the first reply with the value of the expression in it, or with "error"; the second reply ends the episode.

    Args:
        task: judges the second reply.
        role: of the calculator's message; some chat templates have no "tool".
    """

    def __init__(self, task: Task, role: str = "user"):
        self.task, self.role, self.replies = task, role, 0

    def reset(self, example: Example) -> Messages:
        """The example's chat."""
        self.example, self.replies = example, 0
        return example.messages

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The calculator's answer, then the end with the task's verdict."""
        self.replies += 1
        if self.replies == 1:
            return [{"role": self.role, "content": calculate(reply)}], None
        return [], self.task.verify(self.example, reply) if self.task.verifies else None


def calculate(text: str) -> str:
    """The value of an expression of integers, +, - and *; "error" for anything else."""
    try:
        return str(_value(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**12:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no expression of whole numbers, +, - and *")


def calculator(task: Task, role: str = "user") -> Callable[[], Calculator]:
    """Makes a new episode each time it is called."""
    return partial(Calculator, task, role)
