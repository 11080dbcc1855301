"""The student writes: on-policy rollouts, alone or with an environment that answers."""

from collections.abc import Callable, Mapping
from typing import Any

from opd_lightning.contracts import Environment, Generator
from opd_lightning.rollout.base import check_options, single_turn
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.types import Prompts, Rollout, SamplingParams


class StudentRollout:
    """The student samples completions of its own prompts.

    Args:
        renderer: the student's.
        max_new_tokens, temperature, top_p, top_k: see `SamplingParams`.
        samples_per_prompt: completions per prompt.
        updates_per_rollout: optimizer steps taken on one rollout.
        truncated: "keep" completions that ran into the token limit in the loss, or "mask" them.
        environment: makes a new episode for each sample; None ends after the first reply.
    """

    on_policy = True
    student_writes = True
    reads_references = False
    teachers: frozenset[str] = frozenset()

    def __init__(
        self,
        renderer: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        samples_per_prompt: int = 1,
        updates_per_rollout: int = 1,
        truncated: str = "keep",
        environment: Callable[[], Environment] | None = None,
    ):
        if temperature == 0:
            raise ValueError("rollout.temperature=0 never explores; training rollouts need a positive one, 1.0 is usual.")
        check_options(updates_per_rollout, truncated)
        self.sampling = SamplingParams(max_new_tokens, temperature, top_p, top_k, samples_per_prompt)
        self.updates_per_rollout, self.truncated = updates_per_rollout, truncated
        self.episodes = None if environment is None else Episodes(environment, renderer, self.sampling, truncated)

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, Any]) -> Rollout:
        """One sample per prompt and completion, drawn from `seed`."""
        if self.episodes is not None:
            return Rollout(self.episodes.play(prompts.examples, seed, generator))
        done, n = generator.generate(prompts.rendered, self.sampling, seed), self.sampling.n
        return Rollout(
            [
                single_turn(prompts.examples[i // n], i // n, prompts.rendered[i // n], completion, "student", self.truncated)
                for i, completion in enumerate(done)
            ]
        )
