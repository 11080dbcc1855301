"""Lookup: the embedded world's environment of two turns, in which a look-up answers the digits that the student passes on.

    copy rotate 3 1 4 1 5 =  ->  answer 3 1 4 1 5 <eos>           the student's query: the digits of the question
    [ result 1 , 4 , 1 , 5 , 3 ] =  ->  answer 1 4 1 5 3 <eos>    the look-up's result for them, and the student's answer

The start model passes on about half of the questions, and repeats most results.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from opd_lightning.contracts import Task
from opd_lightning.toy.world import LENGTH, OPERATIONS, WorldTask, write
from opd_lightning.types import Example, Messages, Verdict


class LookupTask(WorldTask):
    """Learn to use the look-up for a new operation; keep the four prior ones, which are answered at once.

    A reference has both replies of the new skill. Its demonstration is the query alone, in the form in which the start model
    was shown demonstrations; the solution is the answer.

    Args:
        results: the style of the look-up's results.
        skill, style, n_train, n_eval, length, max_new_tokens, batch_size, contexts: see `WorldTask`.
    """

    def __init__(
        self,
        skill: str = "rotate",
        style: str = "native",
        results: str = "listed",
        n_train: int = 256,
        n_eval: int = 256,
        length: int = LENGTH,
        max_new_tokens: int = 16,
        batch_size: int = 64,
        contexts: Mapping[str, Any] | None = None,
    ):
        super().__init__(skill, style, "native", n_train, n_eval, length, "new", max_new_tokens, batch_size, contexts)
        self.results = results

    def _example(self, operation: str, position: int, skill: str) -> Example:
        example = super()._example(operation, position, skill)
        if skill != "new":
            return example
        question = example.messages[-1]["content"]
        digits = tuple(map(int, question.split()[1:]))
        query, found = write(digits, self.style), write(OPERATIONS[operation](digits), self.results)
        turns = [
            {"role": "assistant", "content": query},
            {"role": "user", "content": f"[ {found} ]"},
            {"role": "assistant", "content": str(example.completion)},
        ]
        asked = [{"role": "user", "content": f"copy {question}"}]
        return replace(example, messages=asked, completion=None, turns=turns, demonstration=query)


class Lookup:
    """Answers the first reply with the result of the question's operation on its digits; the task judges the second.

    Args:
        task: a `WorldTask`. All of its questions are to be looked up; of a `LookupTask` those of the new skill.
        style: of the results; None takes that of the task's references, or "listed".

    Attributes:
        metrics: numbers of the episode: whether the query has the wrong number of digits.
    """

    def __init__(self, task: Task, style: str | None = None):
        self.task, self.style, self.replies = task, style or str(getattr(task, "results", "listed")), 0
        self.metrics = {"tool_errors": 0.0}

    def reset(self, example: Example) -> Messages:
        """The question, whose digits are to be passed on."""
        self.example, self.replies = example, 0
        question = example.messages[-1]["content"]
        asked = example.turns is not None
        self.operation, *self.digits = question.removeprefix("copy ").split() if asked else question.split()
        self.answers = asked or not isinstance(self.task, LookupTask)
        if asked or not self.answers:
            return example.messages
        return [*example.messages[:-1], {"role": "user", "content": f"copy {question}"}]

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The result, then the end with the task's verdict."""
        self.replies += 1
        if self.replies > 1 or not self.answers:
            return [], self.task.verify(self.example, reply)
        digits = tuple(int(word) for word in reply.split() if word.isdigit())
        if len(digits) != len(self.digits):
            self.metrics["tool_errors"] = 1.0
            return [{"role": "user", "content": "[ red ]"}], None
        return [{"role": "user", "content": f"[ {write(OPERATIONS[self.operation](digits), self.style)} ]"}], None


def lookup(task: Task, style: str | None = None) -> Callable[[], Lookup]:
    """Makes a new episode each time it is called.

    Raises:
        ValueError: the task's questions are not the embedded world's.
    """
    first = task.examples("train")[0].messages[-1]["content"].split()
    if not first or first[0] not in OPERATIONS:
        raise ValueError("environment=lookup answers questions of task=world alone; choose environment=tool_use.")
    return partial(Lookup, task, style)
