"""Samples for a teacher that lacks some of the student's tokens, for which it has no embedding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.types import Sample
from opd_lightning.utils.vocabulary import ValidIds


@dataclass(frozen=True)
class Readable:
    """Samples and prompts in a teacher's tokens.

    Attributes:
        samples, prompts: with a filler in place of ids that the teacher lacks; tokens behind it are not valid.
        valid [N]: trainable tokens before the first missing id; none where the prompt has one.
        cut [B]: samples with a missing id.
    """

    samples: list[Sample]
    prompts: list[list[int] | None]
    valid: Tensor
    cut: Tensor


def readable(samples: Sequence[Sample], prompts: Sequence[list[int] | None], valid_ids: ValidIds) -> Readable:
    """Replace the ids that are not in `valid_ids` by a filler, and mark the tokens behind them as not valid."""
    filler = next(i for i in range(valid_ids.size) if i not in valid_ids.absent)
    filled, filled_prompts, valid, cut = [], [], [], []
    for sample, prompt in zip(samples, prompts, strict=True):
        in_vocabulary = valid_ids.contains(sample.token_ids)
        in_prompt = (
            in_vocabulary[: sample.prompt_length]
            if prompt is None
            else valid_ids.contains(torch.tensor(prompt, dtype=torch.long))
        )
        before = in_vocabulary[sample.prompt_length :].long().cumprod(0).bool() & bool(in_prompt.all())
        valid.append(before[sample.loss_mask[sample.prompt_length :]])
        cut.append(not bool(before.all()))
        filled.append(replace(sample, token_ids=torch.where(in_vocabulary, sample.token_ids, filler)))
        filled_prompts.append(
            None
            if prompt is None
            else [i if present else filler for i, present in zip(prompt, in_prompt.tolist(), strict=True)]
        )
    return Readable(filled, filled_prompts, torch.cat(valid), torch.tensor(cut))
