"""A rollout of reference completions with gaps in their loss masks, as environments leave them."""

from dataclasses import replace
from typing import Any

import torch

from opd_lightning.rollout import DatasetRollout
from opd_lightning.types import Prompts, Rollout


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
