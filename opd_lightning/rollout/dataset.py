"""DatasetRollout: reference completions, for SFT and offline distillation."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from opd_lightning.contracts import Environment, Generator, Renderer
from opd_lightning.rollout.base import check_options, single_turn
from opd_lightning.rollout.stepping import closed
from opd_lightning.types import Completion, Example, Prompts, Rendered, Rollout, Sample, SamplingParams


class DatasetRollout:
    """Each prompt's reference completion, closed with the end token; of a conversation, all replies that are learned.

    Args:
        renderer: the student's.
        sampling: completions of more trainable tokens than its max_new_tokens are cut there and count as truncated.
        num_generations: must be 1; more would be copies.
        num_iterations, mask_truncated_completions: as for the student's rollouts.
        environment: begins the episodes that evaluations play; the references stand behind its first messages and tools. None
            takes the examples' own.
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
        environment: Callable[[], Environment] | None = None,
    ):
        if getattr(environment, "remote", False):
            raise ValueError(
                "rollout=dataset has references, which do not answer what a server shows when an episode begins; choose "
                "rollout=student, or environment=single_turn."
            )
        if num_generations != 1:
            raise ValueError(
                f"rollout.num_generations={num_generations} repeats the same reference; use 1, or rollout=student."
            )
        check_options(num_generations, num_iterations)
        self.renderer, self.sampling, self.environment = renderer, sampling, environment
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
            if example.reference is None:
                raise ValueError(f"example {example.id} has no completion to imitate; rollout=dataset needs one for each.")
            try:
                if self.environment is None:
                    sample = reference_sample(self.renderer, example, i, prompt)
                else:
                    sample = reference_sample(self.renderer, begun(self.environment, example), i)
            except ValueError as error:
                raise ValueError(f"example {example.id}: {error}") from error
            cut = truncated(sample, self.sampling.max_new_tokens)
            samples.append(replace(cut, include_in_loss=not self.mask_truncated or cut.finish_reason != "length"))
        return Rollout(samples)


def begun(environment: Callable[[], Environment], example: Example) -> Example:
    """An example with the messages and tools with which an environment begins its episode."""
    episode = environment()
    try:
        messages = episode.reset(example)
    finally:
        closed([episode])
    return replace(example, messages=messages, tools=getattr(episode, "tools", None) or example.tools)


def reference_sample(renderer: Renderer, example: Example, group: int = 0, prompt: Rendered | None = None) -> Sample:
    """The sample of an example's reference: one reply, or the replies of a conversation with gaps between them.

    Args:
        prompt: as the student reads it; None renders it.

    Raises:
        ValueError: the chat template does not render it as it is read.
    """
    if example.turns is None:
        prompt = renderer.render(example.messages, example.tools) if prompt is None else prompt
        ids = reply_ids(renderer, example)
        return single_turn(example, group, prompt, Completion(ids, "stop"), "dataset", False)
    found = renderer.conversation(example.messages, example.turns, example.tools)
    return Sample(
        example=example,
        group=group,
        token_ids=torch.tensor(found.token_ids, dtype=torch.long),
        loss_mask=torch.tensor(found.loss_mask),
        prompt_length=found.prompt_length,
        source="dataset",
        finish_reason="stop",
        turns=list(example.turns[:-1]),
    )


def reply_ids(renderer: Renderer, example: Example) -> list[int]:
    """Token ids of an example's completion behind its prompt."""
    tools = {"tools": example.tools} if example.tools else {}
    return renderer.reply(str(example.completion), example.messages, **tools)


def truncated(sample: Sample, limit: int) -> Sample:
    """The sample, cut behind so many trainable tokens where it has more."""
    if sample.trainable <= limit:
        return sample
    end = int(sample.loss_mask.nonzero()[limit - 1]) + 1
    return replace(sample, token_ids=sample.token_ids[:end], loss_mask=sample.loss_mask[:end], finish_reason="length")
