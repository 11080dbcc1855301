"""Contracts: protocols of tasks, environments, generators, rollouts and teachers. Axis letters as in types.py."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from opd_lightning.types import (
    Completion,
    Conversation,
    Cost,
    Example,
    Messages,
    Prompts,
    Rendered,
    Rollout,
    Sample,
    SamplingParams,
    Verdict,
)
from opd_lightning.utils.vocabulary import ValidIds

Provides = Literal["full", "topk", "sampled"]
"""Kinds of targets: the full vocabulary, the k most probable tokens, or the written token's log-probability."""


class Task(Protocol):
    """A task. Splits are "train", "validation" and "test", disjoint by construction.

    Attributes:
        verifies: whether it has a verifier; False refuses objectives that read rewards.
        max_new_tokens: how long a useful answer can be; the default of rollouts and evaluations.
        batch_size: prompts per rollout; the default of data.batch_size.
        contexts: how each option of `conf/context` is worded for it; read by the configuration only.

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
    """One episode: a chat that goes on after the student's reply. A new object for each sample.

    It may also have
        tools               JSON schemas that the chat template describes; else those of the example are
        message(reply)      the reply as a turn of the chat, with its tool calls; else its text alone
        verdict(reply)      the verdict on the whole episode; without it, or with None, that of the last `step`
        step_all(environments, replies, seed)  steps of several episodes at once, drawn from the seed, in place of `step`
        threaded            True: `reset` and `step` are called in threads, beside those of other episodes
        step_seconds        limit of each such call, after which the episode has failed
        keeps_special_tokens  True: replies have special tokens in their text
        judges              True, on what makes episodes too: its verdicts are those of training, also without a verifier
        close()             called when the episode is over
        metrics             numbers of the episode by name, always the same names; their means are logged
        flops               of models that answered in the episode
        models              on what makes episodes: the `Pretrained` beside the student by name, for the plan of memory
    """

    def reset(self, example: Example) -> Messages:
        """The chat that the student reads first."""
        ...

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The messages that answer a reply, none where the episode ends; and a verdict on the reply, or None.

        Verdicts before the end are read where replies answer for their own rewards (`loss.policy_gradient.credit`).
        """
        ...


class Generator(Protocol):
    """An inference engine, for rollouts, teachers that generate, and evaluations.

    An engine may have `metrics`, numbers by name of its last update, which are logged. One with a copy of the weights may have
    `holds_weights` = True: its `generate` without a `model` may then be called in a thread while the student trains, so it
    draws from random states of its own.
    """

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, model: Any = None) -> list[Completion]:
        """`sampling.n` completions per prompt, those of one prompt adjacent; equal seeds give equal completions.

        Args:
            model: a callable that returns a context manager with another language model, such as a teacher's; None takes the
                student of the last `update_weights`.
        """
        ...

    def update_weights(self, student: Any, version: int | None) -> None:
        """Use the student's current weights; `version` counts optimizer steps, None is for temporarily changed weights."""
        ...

    def close(self) -> None:
        """Release the engine's resources."""
        ...


class Renderer(Protocol):
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: the model's.
        template_options: keyword arguments for the chat template.
        end_ids: every id that ends a reply.
    """

    tokenizer: Any
    template_options: dict[str, Any]

    @property
    def end_ids(self) -> Sequence[int]: ...

    @property
    def valid_ids(self) -> ValidIds | None:
        """The ids that are tokens of the tokenizer; None takes every row of the model's output layer for one."""
        ...

    def render(self, messages: Messages, tools: Sequence[Any] | None = None) -> Rendered:
        """A chat up to where the assistant's reply begins."""
        ...

    def reply(self, text: str, messages: Messages | None = None, tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of an assistant's reply behind a chat, with its end token."""
        ...

    def conversation(self, messages: Messages, turns: Messages, tools: Sequence[Any] | None = None) -> Conversation:
        """A chat and the turns behind it, of which the assistant's are learned; raises ValueError if they cannot be told."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...

    def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row without special tokens."""
        ...


class RolloutPolicy(Protocol):
    """A source of completions; see `opd_lightning.rollout`.

    It may have `async_steps`, the number of rollouts to write ahead of training; it is then called in another thread.

    Attributes:
        on_policy: whether all completions are samples of the student itself.
        student_writes: whether any of them are.
        reads_references: whether it needs a reference completion for each example.
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
    """A teacher's outputs on n tokens; see `opd_lightning.losses.targets`.

    Attributes:
        valid [n]: whether the token has a target; None where all have.
        shared: the ids that the target covers where the student has more; None where it covers all of the student's.

    Log-probabilities of other outcomes than the student's tokens, as of a teacher with another tokenizer, have
    `compared(log_s, tokens)`, which puts the student on them; see `opd_lightning.losses.aligned_targets`.
    """

    valid: Tensor | None
    shared: ValidIds | None

    def take(self, index: Tensor | slice) -> Self:
        """The rows at an index."""
        ...

    def narrow(self, vocabulary: int, dtype: torch.dtype) -> Self:
        """The target on the first ids of the vocabulary, which both models have, in a dtype."""
        ...

    def log_probs(self, temperature: float) -> Any:
        """The target as log-probabilities, of logits divided by the temperature."""
        ...


class TeacherScores(Protocol):
    """A teacher's outputs on N packed tokens, stored compactly until a chunk is needed.

    Attributes:
        vocabulary: V. A teacher that lacks ids below V names them in a tuple `absent`.
        valid [N]: whether the token has a target; None where all have.
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
        """The target of the rows; logits into `out` [n, V] if it fits."""
        ...


class Teacher(Protocol):
    """A model that scores the student's tokens, and may generate; see `opd_lightning.teachers`.

    Derive teachers from `teachers.BaseTeacher`, which has defaults for all of this but `score`, and for further members: what a
    teacher may be used for, and checks before it is loaded.

    Attributes:
        provides: the kinds of targets it can give.
        top_k: size of its top k; None for the full vocabulary.
        parts: the teachers of a mixture; itself for a single one.
    """

    provides: frozenset[Provides]
    top_k: int | None
    parts: Sequence[Any]

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Called once, on the student's device, before a checkpoint is restored: load or copy weights, open connections."""
        ...

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> TeacherScores:
        """Targets for the trainable tokens of the samples, in their order; at most so many padded tokens at a time."""
        ...

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the logits of so many positions, which are computed with the loss."""
        ...

    def after_update(self) -> None:
        """Called after each optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run cannot recompute."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        ...
