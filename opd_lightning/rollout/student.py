"""StudentRollout: on-policy completions, with or without an environment."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opd_lightning.contracts import Environment, Generator
from opd_lightning.rollout.base import check_options, single_turn
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.types import Prompts, Rollout, SamplingParams


class StudentRollout:
    """The student samples completions of its own prompts.

    Args:
        renderer: the student's.
        sampling: of a completion.
        num_generations: completions per prompt.
        num_iterations: optimizer steps taken on one rollout.
        mask_truncated_completions: leave completions that ran into the token limit out of the loss.
        environment: makes a new episode for each sample; None ends after the first reply.
        window: tokens that the student reads at once, where an episode ends; None has no end.
        async_steps: rollouts that are written ahead of training, with the weights of so many rollouts before.
    """

    on_policy = True
    student_writes = True
    reads_references = False
    teachers: frozenset[str] = frozenset()

    def __init__(
        self,
        renderer: Any,
        sampling: SamplingParams,
        num_generations: int = 1,
        num_iterations: int = 1,
        mask_truncated_completions: bool = False,
        environment: Callable[[], Environment] | None = None,
        window: int | None = None,
        async_steps: int = 0,
    ):
        if sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature=0 never explores; training rollouts need a positive one, 1.0 is usual."
            )
        check_options(num_generations, num_iterations, async_steps)
        self.sampling = replace(sampling, n=num_generations)
        self.num_iterations, self.mask_truncated = num_iterations, mask_truncated_completions
        self.async_steps = async_steps
        self.episodes = None
        if environment is not None:
            self.episodes = Episodes(environment, renderer, self.sampling, self.mask_truncated, window)

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, Any]) -> Rollout:
        """One sample per prompt and completion, drawn from `seed`."""
        if self.episodes is not None:
            return Rollout(self.episodes.play(prompts.examples, seed, generator))
        done, n = generator.generate(prompts.rendered, self.sampling, seed), self.sampling.n
        return Rollout(
            [
                single_turn(
                    prompts.examples[i // n], i // n, prompts.rendered[i // n], completion, "student", self.mask_truncated
                )
                for i, completion in enumerate(done)
            ]
        )
