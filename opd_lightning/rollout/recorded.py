"""RecordedRollout: completions that were written to files before training, by python -m opd_lightning.score."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from opd_lightning.contracts import Generator
from opd_lightning.data.score_files import Place, ScoreFiles
from opd_lightning.rollout.base import check_options
from opd_lightning.types import Example, Prompts, Rendered, Rollout, Sample, SamplingParams
from opd_lightning.utils.seeds import derive_seed


class RecordedRollout:
    """Each prompt's recorded completions, such as the start model's own (Lightning-OPD): training without an engine.

    Args:
        path: the folder.
        sampling: its max_new_tokens is not used; completions are as long as they were recorded.
        num_iterations, mask_truncated_completions: as for the student's rollouts.

    Raises:
        ValueError: the folder holds no complete recording.
    """

    on_policy = False
    student_writes = False
    reads_references = False
    teachers: frozenset[str] = frozenset()

    def __init__(
        self,
        path: str | None,
        sampling: SamplingParams,
        num_iterations: int = 1,
        mask_truncated_completions: bool = False,
    ):
        if path is None:
            raise ValueError("rollout.path=null: give the folder that python -m opd_lightning.score has written.")
        check_options(1, num_iterations)
        self.files, self.path = ScoreFiles(path, "rollout.path"), path
        self.sampling = replace(sampling, n=self.files.index.num_generations)
        self.num_iterations, self.mask_truncated = num_iterations, mask_truncated_completions

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, Any]) -> Rollout:
        """The completions of one pass over these prompts; with several passes, one is drawn from the seed."""
        samples = []
        for group, (example, prompt) in enumerate(zip(prompts.examples, prompts.rendered, strict=True)):
            places, n = self.files.by_example.get(example.id, []), self.sampling.n
            if not places:
                why = self.files.why_other(example, prompt.token_ids)
                raise ValueError(f"rollout.path={self.path} has no completion of example {example.id}: {why}. Record it again.")
            first = derive_seed(seed, example.id) % (len(places) // n) * n
            samples += [self.sample(place, example, group, prompt) for place in places[first : first + n]]
        return Rollout(samples)

    def sample(self, place: Place, example: Example, group: int, prompt: Rendered) -> Sample:
        """A recorded sample.

        Raises:
            ValueError: its prompt is not what the student reads now.
        """
        names = ("token_ids", "loss_mask", "prompt_length", "logprobs", "truncated")
        read = {name: self.files.rows(name, place) for name in names}
        ids, mask, length = read["token_ids"], read["loss_mask"], read["prompt_length"]
        assert ids is not None and mask is not None and length is not None
        if ids[: int(length)].tolist() != prompt.token_ids:
            why = self.files.why_other(example, prompt.token_ids)
            raise ValueError(f"rollout.path={self.path} does not fit: {why}. Bring back what was recorded, or record it again.")
        cut = bool(read["truncated"])
        reason: Literal["stop", "length"] = "length" if cut else "stop"
        source: Any = self.files.index.source
        return Sample(
            example=example,
            group=group,
            token_ids=ids.to(torch.long),
            loss_mask=mask,
            prompt_length=int(length),
            source=source,
            finish_reason=reason,
            logprobs=read["logprobs"],
            include_in_loss=not (self.mask_truncated and cut),
        )
