"""Data types of a training step: prompts -> rollout -> score -> loss -> update. Imports nothing from this package.

Axis letters, here and everywhere: B samples (prompts x samples per prompt), T completion tokens, L prompt and completion
tokens together, N trainable tokens of several samples packed on one axis, V vocabulary, H hidden, k the most probable tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

Messages = list[dict[str, Any]]
"""A chat as transformers' chat templates take it: [{"role": "user", "content": "..."}, ...]."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task, with its reference answers.

    Attributes:
        id: unique within the task, stable across runs.
        messages: the chat shown to the student.
        completion: the reference answer that SFT imitates, or None.
        turns: a reference of several turns in its place, from the first reply that is learned to the last one; None without.
        tools: JSON schemas of the functions that the chat template describes, or None.
        demonstration: an expert's answer that a teacher may be shown, or None.
        solution: a reference solution that a teacher may be shown, or None.
        skill: the name under which evaluation groups this example, such as "new" or "prior/sort".
        extra: data for the task's verifier.
    """

    id: str
    messages: Messages
    completion: str | None = None
    demonstration: str | None = None
    solution: str | None = None
    skill: str = "new"
    extra: dict[str, str] = field(default_factory=dict)
    turns: Messages | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def reference(self) -> Messages | None:
        """The turns that SFT imitates, `turns` or the completion as a turn; None without either."""
        own = None if self.completion is None else [{"role": "assistant", "content": self.completion}]
        return own if self.turns is None else self.turns


@dataclass(frozen=True)
class Verdict:
    """The verdict of a verifier or an environment on one completion; each score lies in [0, 1].

    Attributes:
        content: the score of the answer, however it is written; this is the reward.
        format: the score of the form that the task wants, never rewarded; None if the task has no format.
        feedback: the environment's feedback, such as a failed test; None without any.
    """

    content: float
    format: float | None = None
    feedback: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A completion of the student's and its verdict."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, in rollouts and evaluations.

    Attributes:
        max_new_tokens: completions end there if no end token has come.
        temperature: divides the logits; 0 is greedy.
        top_p, top_k: 1.0 and 0 leave the distribution unchanged.
        n: completions per prompt.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        for name, fits, remedy in (
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1."),
            ("temperature", self.temperature >= 0, "not be negative; 0 is greedy."),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]; 1 leaves the distribution unchanged."),
            ("top_k", self.top_k >= 0, "not be negative; 0 leaves the distribution unchanged."),
            ("n", self.n >= 1, "be at least 1."),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must {remedy}")


@dataclass(frozen=True)
class Rendered:
    """A chat as a model reads it.

    Attributes:
        token_ids: of the text.
        model_inputs: what else the model takes, such as pixel_values; empty for text.
    """

    token_ids: list[int]
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """A chat of several turns as a model reads it.

    Attributes:
        token_ids: of the whole chat, up to the end of the last reply that is learned.
        loss_mask, prompt_length: True on the tokens that are learned, replies with their end tokens; tokens before the first.
        exact: whether these are the tokens of the rendered chat.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    exact: bool = True


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt.

    Attributes:
        token_ids: with the end token, if one came.
        finish_reason: "stop" at an end token, "length" at the limit.
        logprobs: of each token under the distribution that it was drawn from; None when greedy.
        policy_version: version of the student's weights that wrote it; None for other models or temporarily changed weights.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    policy_version: int | None = None


class Prompts:
    """A batch of prompts.

    A plain class, because Lightning copies dataclasses field by field on their way to the device.

    Attributes:
        examples: one per prompt.
        rendered: as the student reads them.
    """

    def __init__(self, examples: Sequence[Example], rendered: Sequence[Rendered]):
        self.examples, self.rendered = list(examples), list(rendered)

    def take(self, indices: Sequence[int]) -> "Prompts":
        """The prompts at these indices."""
        return Prompts([self.examples[i] for i in indices], [self.rendered[i] for i in indices])


@dataclass(frozen=True)
class Sample:
    """One sequence with its data. Tensors are on the CPU.

    Attributes:
        example, group: its prompt; samples of one prompt share the group.
        token_ids [L]: prompt, what the student wrote, what an environment wrote.
        loss_mask [L]: True on trainable tokens; gaps are the environment's.
        prompt_length: a teacher may read its own prompt in place of token_ids[:prompt_length].
        source: the source of its completion.
        finish_reason: why it ended.
        logprobs [L]: of each trainable token under the distribution that it was drawn from; None where that is not known.
        verdict: an environment's or the task's; None before it is judged, or without a verifier.
        policy_version: optimizer steps of the weights that wrote it; None if the student did not.
        include_in_loss: False leaves the sample out of the loss.
        model_inputs: what else the model takes.
        metrics: numbers of its episode, such as "turns", whose means are logged; empty without an environment.
        turns: its messages behind the prompt, without the last reply; empty where it has one reply.
        turn_verdicts: the environment's verdict on each reply, or None; empty where it gives none.
        environment_flops: of models that answered in its episode.
    """

    example: Example
    group: int
    token_ids: Tensor
    loss_mask: Tensor
    prompt_length: int
    source: Literal["student", "teacher", "dataset"]
    finish_reason: Literal["stop", "length", "environment"]
    logprobs: Tensor | None = None
    verdict: Verdict | None = None
    policy_version: int | None = None
    include_in_loss: bool = True
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    turns: Messages = field(default_factory=list)
    turn_verdicts: Sequence[Verdict | None] = ()
    environment_flops: int = 0

    @property
    def completion_ids(self) -> list[int]:
        """Everything behind the prompt."""
        return self.token_ids[self.prompt_length :].tolist()

    @property
    def reply_ids(self) -> list[int]:
        """The last run of trainable tokens: the completion, or the last reply of a conversation."""
        last = int(self.loss_mask.nonzero().max()) + 1 if self.loss_mask.any() else len(self.token_ids)
        gaps = (~self.loss_mask[:last]).nonzero()
        return self.token_ids[int(gaps.max()) + 1 if len(gaps) else 0 : last].tolist()

    @property
    def trainable(self) -> int:
        """Number of trainable tokens."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Cost:
    """A cost: tokens that a model read or wrote, and floating-point operations."""

    tokens: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.flops + other.flops)


@dataclass(frozen=True)
class Rollout:
    """Samples, those of a prompt adjacent; the cost of those that a teacher wrote; scores of teachers that have read them."""

    samples: list[Sample]
    teacher_cost: Cost = field(default_factory=Cost)
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """The inputs of losses for each trainable token; every tensor has the packed axis N, or is None.

    Attributes:
        ids: the token.
        position: its index among the trainable tokens of its sample, from 0.
        weight: its share of the batch loss: the loss is the sum of weight x per-token loss.
        sample: the index of its sample in the batch.
        reward: the verdict on its sample.
        advantage: its advantage, for policy-gradient terms.
        old_logprob: its log-probability before the first update on this rollout; None on the first (the ratio is 1).
        sampler_logprob: its log-probability under the distribution it was drawn from, if that is known.
        group: the index of its prompt in the batch.
        pass_rate: the mean reward of its prompt's completions.
        own: whether the student wrote it; None where all tokens are alike in this.
        future: the discounted divergence behind it in its sample, where the loss reads returns; see `losses.returns`.
        seen: statistics of student and teacher before the first update on this rollout, by name; see `Objective.observe`.
    """

    ids: Tensor
    position: Tensor
    weight: Tensor
    sample: Tensor | None = None
    reward: Tensor | None = None
    advantage: Tensor | None = None
    old_logprob: Tensor | None = None
    sampler_logprob: Tensor | None = None
    group: Tensor | None = None
    pass_rate: Tensor | None = None
    own: Tensor | None = None
    future: Tensor | None = None
    seen: Mapping[str, Tensor] | None = None

    def scaled(self, factor: float) -> "Tokens":
        """The same tokens with their weights multiplied."""
        return replace(self, weight=self.weight * factor)

    def take(self, index: Tensor | slice) -> "Tokens":
        """The tokens at an index of the packed axis."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seen"}
        seen = None if self.seen is None else {name: value[index] for name, value in self.seen.items()}
        return replace(self, seen=seen, **{name: value[index] for name, value in columns.items() if value is not None})


@dataclass(frozen=True)
class Sequences:
    """Samples right-padded, ready for one forward pass.

    Attributes:
        input_ids [B, L], attention_mask [B, L].
        row [N], column [N]: where the hidden state that predicts each trainable token stands.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    column: Tensor
