"""Rollouts of given completions: with gaps in their loss masks, and of episodes that are the same on any number of devices."""

from dataclasses import replace
from typing import Any

import torch

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.rollout import DatasetRollout, StudentRollout
from opd_lightning.types import Completion, Example, Messages, Prompts, Rollout, Verdict


class GappedRollout(DatasetRollout):
    """Every third token of a completion counts as an environment's."""

    def __call__(self, prompts: Prompts, *args: Any) -> Rollout:
        """The reference completions with their gaps."""
        rollout = super().__call__(prompts)
        samples = []
        for sample in rollout.samples:
            behind = torch.arange(len(sample.token_ids)) - sample.prompt_length
            samples.append(replace(sample, loss_mask=sample.loss_mask & (behind % 3 != 1)))
        return Rollout(samples)


class Counting:
    """An environment that answers with the number of words, up to three replies, and judges each by it."""

    def reset(self, example: Example) -> Messages:
        """The example's chat."""
        self.turns = 0
        return example.messages

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The number of words, until it is 3 or the third reply has come."""
        self.turns += 1
        n = len(reply.split())
        verdict = Verdict(n / 5, feedback="answer" if n < 4 else None)
        return ([], verdict) if n == 3 or self.turns == 3 else ([{"role": "user", "content": f"{n} {n}"}], verdict)


class Written:
    """A generator whose replies follow from what stands before them, and from the place in the group."""

    def __init__(self, renderer: ChatRenderer, n: int):
        self.renderer, self.n = renderer, n

    def generate(self, prompts: Any, sampling: Any, seed: int, model: Any = None) -> list[Completion]:
        """One to five digits."""
        rows = []
        for i, prompt in enumerate(prompts):
            code = sum(k * token for k, token in enumerate(prompt.token_ids)) + (i % self.n if self.first(prompt) else 0)
            words = " ".join(str((code + k) % 10) for k in range(1 + code % 5))
            ids = self.renderer.reply(words)
            rows.append(Completion(ids, "stop", [-1.0] * len(ids), 0))
        return rows

    def first(self, prompt: Any) -> bool:
        """Whether no reply stands before."""
        return not set(prompt.token_ids) & set(self.renderer.end_ids)


class PlayedRollout(StudentRollout):
    """Episodes of `Counting` with `Written` replies."""

    def __init__(self, renderer: Any, **options: Any):
        super().__init__(renderer, **{**options, "environment": Counting})
        self.renderer = renderer

    def __call__(self, prompts: Prompts, seed: int, *args: Any) -> Rollout:
        """The episodes."""
        assert self.episodes is not None
        return Rollout(self.episodes.play(prompts.examples, seed, Written(self.renderer, self.sampling.n)))
