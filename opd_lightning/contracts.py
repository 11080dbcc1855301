"""The contracts: what tasks, environments, generators, rollouts and teachers have to offer. Axis letters as in types.py."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from opd_lightning.types import Completion, Cost, Example, Messages, Prompts, Rendered, Rollout, Sample, SamplingParams, Verdict

Provides = Literal["full", "topk", "sampled"]
"""What a teacher can say of a token: the whole vocabulary, its k most probable tokens, the written token's log-probability."""


class Task(Protocol):
    """What a task offers. Splits are "train", "validation" and "test", disjoint by construction.

    Attributes:
        verifies: do verdicts mean anything? False refuses objectives that learn from rewards.
        max_new_tokens: how long a useful answer can be; the default of rollouts and evaluations.
        batch_size: prompts per rollout that suit it; the default of data.batch_size.
        contexts: how each option of `conf/context` is worded for it; read by the configuration, not by the program.

    A task may also have `partial_scores` (True: a content below 1 is not right, and the mean score is reported beside the
    accuracy), `notes` (numbers about its data, for status.json; sentences under "warnings" are said) and
    `leave_out(reasons)`, which takes examples by id out of all splits, or refuses to. Its `max_new_tokens` may be None, which
    covers the references.
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


class Environment(Protocol):
    """One episode: a chat that goes on after the student's reply. A new object for each sample."""

    def reset(self, example: Example) -> Messages:
        """The chat that the student reads first."""
        ...

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The messages that answer a reply, none where the episode ends; and a verdict at its end, or None."""
        ...


class Generator(Protocol):
    """An inference engine. One serves rollouts, teachers that write and evaluations."""

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, model: Any = None) -> list[Completion]:
        """`sampling.n` completions per prompt, those of one prompt adjacent; equal seeds give equal completions.

        Args:
            model: a callable that lends another language model, in a context manager, such as a teacher that writes; None
                takes the student as it was last given by `update_weights`.
        """
        ...

    def update_weights(self, student: Any, version: int | None) -> None:
        """Write with the student's weights of now; `version` counts optimizer steps, None is of weights in between."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


class Renderer(Protocol):
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: the model's.
        template_options: keyword arguments for the chat template.
    """

    tokenizer: Any
    template_options: dict[str, Any]

    def render(self, messages: Messages, tools: Sequence[Any] | None = None) -> Rendered:
        """A chat up to where the assistant's reply begins."""
        ...

    def reply(self, text: str) -> list[int]:
        """Token ids of an assistant's reply with its end token."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...

    def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row without special tokens."""
        ...


class RolloutPolicy(Protocol):
    """Who writes the completions; see `opd_lightning.rollout`.

    Attributes:
        on_policy: are all completions samples of the student itself?
        student_writes: are some of them?
        reads_references: does it need a reference completion for each example?
        teachers: names of the teachers that write, such as "teacher".
        sampling: how completions are drawn, and how many of each prompt.
        num_iterations: optimizer steps taken on one rollout.
    """

    on_policy: bool
    student_writes: bool
    reads_references: bool
    teachers: frozenset[str]
    sampling: SamplingParams
    num_iterations: int

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, "Teacher"]) -> Rollout:
        """The completions of these prompts."""
        ...


class Target(Protocol):
    """What a teacher says of n tokens; see `opd_lightning.losses.targets`.

    Attributes:
        valid [n]: False where the teacher has nothing to say of a token; None where it always has.
    """

    valid: Tensor | None

    def take(self, index: Tensor | slice) -> Self:
        """The rows at an index."""
        ...

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> Self:
        """On the first ids of the vocabulary alone, which both models have, in a dtype."""
        ...

    def log_probs(self, temperature: float) -> Any:
        """As log-probabilities, of logits divided by the temperature."""
        ...


class TeacherScores(Protocol):
    """What a teacher says of N packed tokens, kept small until a chunk is needed.

    Attributes:
        vocabulary: V.
        valid [N]: has the token a target? None where all have.
        cost: of reading, without logits.
        metrics: numbers [B] per sample to log, by name.
    """

    vocabulary: int
    valid: Tensor | None
    cost: Cost
    metrics: Mapping[str, Tensor]

    def take(self, index: Tensor | slice) -> Self:
        """The rows at an index of the packed axis."""
        ...

    def chunk(self, rows: slice, out: Tensor | None = None) -> Target:
        """The target of some rows; logits into `out` [n, V] if it fits."""
        ...


class Teacher(Protocol):
    """Whoever scores the student's tokens, and perhaps writes; see `opd_lightning.teachers`.

    Attributes:
        provides: what it can say of a token.
        top_k: how many of a token's most probable ones it gives; None where it gives all.
        parts: the teachers that it is made of, itself if it is one.
    """

    provides: frozenset[Provides]
    top_k: int | None
    parts: Sequence[Any]

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Once, on the student's device, before a checkpoint is restored: load or copy weights, open connections."""
        ...

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> TeacherScores:
        """Targets for the trainable tokens of the samples, in their order; at most so many padded tokens at a time."""
        ...

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the logits of so many positions, which are made when the loss asks for them."""
        ...

    def after_update(self) -> None:
        """After each optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot make again."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        ...
