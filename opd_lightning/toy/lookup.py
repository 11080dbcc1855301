"""Lookup: the embedded world's environment of two turns; a look-up answers the digits that the student passes on.

    copy rotate 3 1 4 1 5 =  ->  answer 3 1 4 1 5 <eos>           the student's query: the digits of the question
    [ result 1 , 4 , 1 , 5 , 3 ] =  ->  answer 1 4 1 5 3 <eos>    the look-up's result for them, and the student's answer

The start model passes on about half of the questions, and repeats most results.
"""

from collections.abc import Callable
from functools import partial

from opd_lightning.contracts import Task
from opd_lightning.toy.world import OPERATIONS, write
from opd_lightning.types import Example, Messages, Verdict


class Lookup:
    """Answers the first reply with the result of the question's operation on its digits; the task judges the second.

    Args:
        task: a `WorldTask`.
        style: of the results.

    Attributes:
        metrics: numbers of the episode: whether the query has the wrong number of digits.
    """

    def __init__(self, task: Task, style: str = "listed"):
        self.task, self.style, self.replies = task, style, 0
        self.metrics = {"tool_errors": 0.0}

    def reset(self, example: Example) -> Messages:
        """The question, whose digits are to be passed on."""
        self.example, self.replies = example, 0
        question = example.messages[-1]["content"]
        self.operation, *self.digits = question.split()
        return [*example.messages[:-1], {"role": "user", "content": f"copy {question}"}]

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The result, then the end with the task's verdict."""
        self.replies += 1
        if self.replies > 1:
            return [], self.task.verify(self.example, reply)
        digits = tuple(int(word) for word in reply.split() if word.isdigit())
        if len(digits) != len(self.digits):
            self.metrics["tool_errors"] = 1.0
            return [{"role": "user", "content": "[ red ]"}], None
        return [{"role": "user", "content": f"[ {write(OPERATIONS[self.operation](digits), self.style)} ]"}], None


def lookup(task: Task, style: str = "listed") -> Callable[[], Lookup]:
    """Makes a new episode each time it is called.

    Raises:
        ValueError: the task's questions are not the embedded world's.
    """
    first = task.examples("train")[0].messages[-1]["content"].split()
    if not first or first[0] not in OPERATIONS:
        raise ValueError("environment=lookup answers questions of task=world alone; choose environment=tool_use.")
    return partial(Lookup, task, style)
