"""SingleTurn: one reply, judged by the task; the same as a rollout without an environment."""

from collections.abc import Callable
from functools import partial

from opd_lightning.contracts import Task
from opd_lightning.types import Example, Messages, Verdict


class SingleTurn:
    """The student replies once, and the task judges the reply.

    Args:
        task: the verifier.
    """

    def __init__(self, task: Task):
        self.task = task

    def reset(self, example: Example) -> Messages:
        """The example's chat."""
        self.example = example
        return example.messages

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The end, with the task's verdict if it has a verifier."""
        return [], self.task.verify(self.example, reply) if self.task.verifies else None


def single_turn(task: Task) -> Callable[[], SingleTurn]:
    """Makes a new episode each time it is called."""
    return partial(SingleTurn, task)
