"""UserSimulator: a user with a list of turns, one behind each of the student's replies."""

from collections.abc import Callable, Sequence
from functools import partial

from opd_lightning.contracts import Task
from opd_lightning.types import Example, Messages, Verdict


class UserSimulator:
    """Answers each reply with the next turn of a list; the task judges the reply to the last one.

    Args:
        task: judges the last reply.
        turns: texts of the user, the same for all examples; None takes the user's turns of the example's reference
            conversation (task.train_on=all).
    """

    def __init__(self, task: Task, turns: Sequence[str] | None = None):
        self.task, self.turns = task, turns

    def reset(self, example: Example) -> Messages:
        """The example's chat."""
        own = [str(turn["content"]) for turn in example.turns or [] if turn["role"] == "user"]
        self.example, self.left = example, own if self.turns is None else list(self.turns)
        return example.messages

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The next turn; none at the end."""
        return ([{"role": "user", "content": self.left.pop(0)}] if self.left else []), None

    def verdict(self, reply: str) -> Verdict | None:
        """The task's verdict on the last reply."""
        return self.task.verify(self.example, reply) if self.task.verifies else None


def user_simulator(task: Task, turns: Sequence[str] | None = None) -> Callable[[], UserSimulator]:
    """Makes a new episode each time it is called.

    Raises:
        ValueError: neither the configuration nor any example has turns of a user.
    """
    if turns is None and not any(t["role"] == "user" for e in task.examples("train") for t in e.turns or []):
        raise ValueError(
            "environment.turns=null takes the user's later turns of the rows' chats, and there are none; set task.train_on=all "
            "with rows of several turns, or give environment.turns=[...]."
        )
    return partial(UserSimulator, task, turns)
