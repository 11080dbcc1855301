"""MixtureRollout: completions of the student for some prompts, of the data set or the teacher for the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from opd_lightning.contracts import Generator, RolloutPolicy
from opd_lightning.rollout.base import check_options
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.types import Cost, Prompts, Rollout, Sample, SamplingParams
from opd_lightning.utils.seeds import derive_seed


class MixtureRollout:
    """The student completes each prompt with probability `share`, else the other rollout does (GKD's lambda, arXiv 2306.13649).

    GKD draws once per batch; drawing per prompt has the same expectation and less variance.

    Args:
        other: the other rollout; it must have the same number of completions per prompt.
        share: of the prompts that the student answers.
        renderer, sampling, num_generations, num_iterations, mask_truncated_completions, async_steps: as for `StudentRollout`.
    """

    on_policy = False
    student_writes = True
    reads_references = False  # these two are taken from the other rollout
    teachers: frozenset[str] = frozenset()

    def __init__(
        self,
        renderer: Any,
        other: RolloutPolicy,
        share: float,
        sampling: SamplingParams,
        num_generations: int = 1,
        num_iterations: int = 1,
        mask_truncated_completions: bool = False,
        async_steps: int = 0,
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"rollout.share={share} must lie in [0, 1]: 1 leaves every prompt to the student.")
        if other.sampling.n != num_generations:
            raise ValueError(
                f"rollout.num_generations={num_generations}, but the other writer makes {other.sampling.n}; use "
                f"{other.sampling.n}."
            )
        check_options(num_generations, num_iterations, async_steps)
        self.student = StudentRollout(renderer, sampling, num_generations, num_iterations, mask_truncated_completions)
        self.other, self.share, self.sampling = other, share, self.student.sampling
        self.reads_references, self.teachers = other.reads_references, other.teachers
        self.num_iterations, self.async_steps = num_iterations, async_steps

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, Any]) -> Rollout:
        """One sample per prompt and completion, in the order of the prompts."""
        draw = torch.rand(len(prompts.examples), generator=torch.Generator().manual_seed(derive_seed(seed, "mixture")))
        from_student = (draw < self.share).tolist()
        groups: dict[int, list[Sample]] = {}
        cost = Cost()
        for writer, is_student in ((self.student, True), (self.other, False)):
            chosen = [i for i, drawn in enumerate(from_student) if drawn == is_student]
            if not chosen:
                continue
            part = writer(prompts.take(chosen), seed, generator, teachers)
            cost += part.teacher_cost
            for sample in part.samples:
                # Not all samples are the student's, so log-probabilities of the sampler are dropped.
                group = chosen[sample.group]
                groups.setdefault(group, []).append(replace(sample, group=group, logprobs=None))
        return Rollout([sample for group in sorted(groups) for sample in groups[group]], cost)
