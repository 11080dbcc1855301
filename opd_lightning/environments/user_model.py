"""UserModel: a user who is played by a language model, and answers each of the student's replies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_lightning.contracts import Task
from opd_lightning.environments.user_simulator import UserSimulator
from opd_lightning.types import Cost, Example, Messages, Verdict

User = Callable[[Sequence[Messages], int], Sequence[str | None]]
"""The replies to chats, drawn from a seed; None says nothing more.

It may also have `write(chats, seed)`, which gives the cost beside each reply, and `source`, the `Pretrained` that it loads.
"""


class UserModel(UserSimulator):
    """Answers each reply with what a model says as the user; the task judges the reply to the last turn.

    The model reads the conversation with the roles exchanged, so that its own turns are the assistant's.

    Args:
        task: judges the last reply.
        user: writes the user's turns, such as `generation.OwnModel`.
        instruction: its first turn, with the placeholders {prompt}, the chat's last turn, and {reply}.
        max_turns: of the user behind the prompt.
        stop: a turn that has this text ends the episode; None does not.

    Attributes:
        flops: of the user's turns so far.
    """

    flops = 0

    def __init__(self, task: Task, user: User, instruction: str, max_turns: int, stop: str | None):
        super().__init__(task, [])
        self.user, self.instruction, self.max_turns, self.stop = user, instruction, max_turns, stop

    def reset(self, example: Example) -> Messages:
        """The example's chat."""
        self.seen: Messages = []
        return super().reset(example)

    def read(self, reply: str) -> Messages:
        """The chat that the user answers, with a reply as its last turn."""
        asked = self.example.messages[-1]["content"]
        text = reply if self.seen else self.instruction.format(prompt=asked, reply=reply)
        self.seen.append({"role": "user", "content": text})
        return self.seen

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The user's answer; none at the end."""
        return self.step_all([self], [reply], 0)[0]

    @staticmethod
    def step_all(
        environments: Sequence["UserModel"], replies: Sequence[str], seed: int
    ) -> list[tuple[Messages, Verdict | None]]:
        """The user's answers in several episodes, written at once and drawn from the seed."""
        going = [i for i, one in enumerate(environments) if len(one.seen) < 2 * one.max_turns]
        chats = [environments[i].read(replies[i]) for i in going]
        said = dict(zip(going, written(environments[going[0]].user, chats, seed), strict=True)) if going else {}
        return [(one.answered(*said.get(i, (None, Cost()))), None) for i, one in enumerate(environments)]

    def answered(self, text: str | None, cost: Cost) -> Messages:
        """The user's turn with this text; none where it says nothing, or that it is content."""
        self.flops += cost.flops
        if not text or (self.stop is not None and self.stop in text):
            return []
        self.seen.append({"role": "assistant", "content": text})
        return [{"role": "user", "content": text}]


def written(user: Any, chats: Sequence[Messages], seed: int) -> list[tuple[str | None, Cost]]:
    """The replies to chats with their costs, which are 0 where the user does not tell them."""
    if hasattr(user, "write"):
        return list(user.write(chats, seed))
    return [(text, Cost()) for text in user(chats, seed)]


class UserModels:
    """Makes a `UserModel` for each episode.

    Args:
        options: of `UserModel`.
        models: those that stay in memory beside the student, by name.
    """

    def __init__(self, options: Mapping[str, Any], models: Mapping[str, Any]):
        self.options, self.models = options, models

    def __call__(self) -> UserModel:
        """A new episode."""
        return UserModel(**self.options)


def user_model(task: Task, user: User, instruction: str, max_turns: int = 2, stop: str | None = "DONE") -> UserModels:
    """Makes a new episode each time it is called.

    Raises:
        ValueError: the instruction lacks a placeholder or has others, or there are no turns.
    """
    if max_turns < 1:
        raise ValueError(f"environment.max_turns={max_turns} must be at least 1.")
    try:
        whole = instruction.format(prompt="\1", reply="\2")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"environment.instruction is no format string of {{prompt}} and {{reply}} ({error}).") from error
    if "\1" not in whole or "\2" not in whole:
        raise ValueError("environment.instruction must have the placeholders {prompt} and {reply}.")
    options = {"task": task, "user": user, "instruction": instruction, "max_turns": max_turns, "stop": stop}
    source = getattr(user, "source", None)
    return UserModels(options, {} if source is None else {"user": source})
