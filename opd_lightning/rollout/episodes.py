"""Episodes: turns of the student and an environment, for all episodes of a batch at once."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opd_lightning.contracts import Environment, Generator
from opd_lightning.types import Completion, Example, Messages, Rendered, Sample, SamplingParams, Verdict
from opd_lightning.utils.seeds import derive_seed

MAX_TURNS = 16
"""An environment that never ends is stopped after so many replies."""


@dataclass
class Episode:
    """One running conversation; lists are of the tokens after the prompt."""

    example: Example
    group: int
    environment: Environment
    messages: Messages
    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    trainable: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    finish_reason: str | None = None
    policy_version: int | None = None

    def add(self, token_ids: Sequence[int], trainable: bool, logprobs: Sequence[float] | None = None) -> None:
        """Add tokens of the student, with their log-probabilities, or of the environment."""
        self.token_ids += token_ids
        self.trainable += [trainable] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else list(logprobs)


class Episodes:
    """Plays a batch of episodes.

    Args:
        environment: makes a new environment for each sample.
        renderer: the student's.
        sampling: of each reply; max_new_tokens is the limit of all replies of an episode together.
        mask_truncated: leave episodes that ran into the limit out of the loss.
        window: of the model; an episode ends with reason "length" where the next reply would begin behind it.
    """

    def __init__(
        self,
        environment: Callable[[], Environment],
        renderer: Any,
        sampling: SamplingParams,
        mask_truncated: bool,
        window: int | None = None,
    ):
        self.environment, self.renderer, self.sampling, self.mask_truncated = environment, renderer, sampling, mask_truncated
        self.window = sys.maxsize if window is None else window

    def play(self, examples: Sequence[Example], seed: int, generator: Generator) -> list[Sample]:
        """`sampling.n` samples of each example, those of one example adjacent."""
        episodes = [self.begin(e, group) for group, e in enumerate(examples) for _ in range(self.sampling.n)]
        for turn in range(MAX_TURNS):
            active = [episode for episode in episodes if episode.finish_reason is None]
            if not active:
                break
            # The largest remaining limit is that of the batch; replies of the other episodes are truncated to theirs.
            limits = [self.limit(episode) for episode in active]
            prompts = [Rendered([*episode.prompt, *episode.token_ids]) for episode in active]
            sampling = replace(self.sampling, max_new_tokens=max(limits), n=1)
            drawn = seed if turn == 0 else derive_seed(seed, "turn", turn)
            for episode, limit, reply in zip(active, limits, generator.generate(prompts, sampling, drawn), strict=True):
                self.reply(episode, truncate(reply, limit))
        return [self.sample(episode) for episode in episodes]

    def limit(self, episode: Episode) -> int:
        """The tokens that the next reply may have."""
        room = self.window - len(episode.prompt) - len(episode.token_ids)
        return min(self.sampling.max_new_tokens - sum(episode.trainable), room)

    def begin(self, example: Example, group: int) -> Episode:
        """A new episode with the environment's first messages."""
        environment = self.environment()
        messages = environment.reset(example)
        shown = replace(example, messages=messages)  # teachers add their context to these messages
        return Episode(shown, group, environment, messages, self.renderer.render(messages).token_ids)

    def reply(self, episode: Episode, completion: Completion) -> None:
        """Add the student's reply, and the environment's answer to it."""
        episode.add(completion.token_ids, True, completion.logprobs)
        episode.policy_version = completion.policy_version
        if completion.finish_reason == "length":
            episode.finish_reason = "length"
            return
        text = self.renderer.decode(completion.token_ids)
        answers, episode.verdict = episode.environment.step(text)
        if not answers:
            episode.finish_reason = "stop"
            return
        episode.add(self.renderer.between(episode.messages, text, answers), False)
        episode.messages = [*episode.messages, {"role": "assistant", "content": text}, *answers]
        if self.limit(episode) < 1:
            episode.finish_reason = "length"

    def sample(self, episode: Episode) -> Sample:
        """The episode as one sequence; a last answer without a reply is left out."""
        last = max(i for i, own in enumerate(episode.trainable) if own) + 1
        n = len(episode.prompt)
        sampled = self.sampling.temperature > 0
        reason = episode.finish_reason or "environment"
        return Sample(
            example=episode.example,
            group=episode.group,
            token_ids=torch.tensor([*episode.prompt, *episode.token_ids[:last]], dtype=torch.long),
            loss_mask=torch.tensor([False] * n + episode.trainable[:last]),
            prompt_length=n,
            source="student",
            finish_reason=reason,  # type: ignore[arg-type]
            logprobs=torch.tensor([0.0] * n + episode.logprobs[:last]) if sampled else None,
            verdict=episode.verdict,
            policy_version=episode.policy_version,
            include_in_loss=not self.mask_truncated or reason != "length",
        )


def truncate(completion: Completion, limit: int) -> Completion:
    """The completion, truncated to at most `limit` tokens."""
    if len(completion.token_ids) <= limit:
        return completion
    logprobs = None if completion.logprobs is None else completion.logprobs[:limit]
    return Completion(completion.token_ids[:limit], "length", logprobs, completion.policy_version)
