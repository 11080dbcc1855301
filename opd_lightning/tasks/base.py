"""The contract of a task: examples per split, and a verdict on a completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Messages = list[dict[str, str]]
"""A chat as transformers' chat templates take it: [{"role": "user", "content": "..."}, ...]."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task and what is known about its answer.

    Attributes:
        id: unique within the task, stable across runs.
        messages: the chat shown to the student.
        completion: the reference answer that SFT imitates, or None.
        demonstration: an expert's answer that a teacher may be shown, or None.
        solution: a reference solution that a teacher may be shown, or None.
        skill: the name under which evaluation groups this example, such as "new" or "prior/sort".
        extra: whatever the task's own verifier needs.
    """

    id: str
    messages: Messages
    completion: str | None = None
    demonstration: str | None = None
    solution: str | None = None
    skill: str = "new"
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion; each score lies in [0, 1].

    Attributes:
        content: is the answer right, however it is written? This is the reward.
        format: is it written as the task asks? Scored apart, never rewarded; None where the task asks for no format.
        feedback: what the environment says of it, such as a failed test; None where it says nothing.
    """

    content: float
    format: float | None = None
    feedback: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A completion of the student's and its verdict."""

    text: str
    verdict: Verdict


class Task(Protocol):
    """What a task offers. Splits are "train", "validation" and "test", disjoint by construction.

    Attributes:
        verifies: do verdicts mean anything? False refuses objectives that learn from rewards.
        max_new_tokens: how long a useful answer can be; the default of rollouts and evaluations.
        batch_size: prompts per rollout that suit it; the default of data.batch_size.
        contexts: how each option of `conf/context` is worded for it; read by the configuration, not by the program.

    A task may also have `partial_scores` (True: a content below 1 is not right, and the mean score is reported beside the
    accuracy) and `notes` (numbers about its data, for status.json).
    """

    verifies: bool
    max_new_tokens: int
    batch_size: int
    contexts: Mapping[str, Any]

    def examples(self, split: str) -> Sequence[Example]:
        """The examples that methods train on ("train") or are measured on (the others)."""
        ...

    def verify(self, example: Example, completion: str) -> Verdict:
        """Judge a completion (text without special tokens); must not raise on any text."""
        ...
