"""DatasetRollout: reference completions, for SFT and offline distillation."""

from collections.abc import Mapping
from typing import Any

from opd_lightning.contracts import Generator, Renderer
from opd_lightning.rollout.base import check_options, single_turn
from opd_lightning.types import Completion, Prompts, Rollout, SamplingParams


class DatasetRollout:
    """Each prompt's reference completion, closed with the end token.

    Args:
        renderer: the student's.
        sampling: longer completions than its max_new_tokens are cut there and count as truncated.
        num_generations: must be 1; more would be copies.
        num_iterations, mask_truncated_completions: as for the student's rollouts.
    """

    on_policy = False
    student_writes = False
    reads_references = True
    teachers: frozenset[str] = frozenset()

    def __init__(
        self,
        renderer: Renderer,
        sampling: SamplingParams,
        num_generations: int = 1,
        num_iterations: int = 1,
        mask_truncated_completions: bool = False,
    ):
        if num_generations != 1:
            raise ValueError(
                f"rollout.num_generations={num_generations} repeats the same reference; use 1, or rollout=student."
            )
        check_options(num_generations, num_iterations)
        self.renderer, self.sampling = renderer, sampling
        self.num_iterations, self.mask_truncated = num_iterations, mask_truncated_completions

    def __call__(
        self, prompts: Prompts, seed: int = 0, generator: Generator | None = None, teachers: Mapping[str, Any] | None = None
    ) -> Rollout:
        """The reference completions, without sampling.

        Raises:
            ValueError: an example has no completion.
        """
        samples = []
        for i, (example, prompt) in enumerate(zip(prompts.examples, prompts.rendered, strict=True)):
            if example.completion is None:
                raise ValueError(f"example {example.id} has no completion to imitate; rollout=dataset needs one for each.")
            try:
                ids, limit = self.renderer.reply(example.completion, example.messages), self.sampling.max_new_tokens
            except ValueError as error:
                raise ValueError(f"example {example.id}: {error}") from error
            completion = Completion(ids[:limit], "length" if len(ids) > limit else "stop")
            samples.append(single_turn(example, i, prompt, completion, "dataset", self.mask_truncated))
        return Rollout(samples)
