"""What a teacher can read: it has no row, or none that means anything, for words that only the student has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.types import Sample
from opd_lightning.utils.vocabulary import Words


@dataclass(frozen=True)
class Readable:
    """Samples and prompts in the words of a teacher.

    Attributes:
        samples, prompts: with some known id in place of unknown ones; what follows such an id is not valid.
        valid [N]: trainable tokens before the first unknown id; none where the prompt holds one.
        cut [B]: whose reading ends early.
    """

    samples: list[Sample]
    prompts: list[list[int] | None]
    valid: Tensor
    cut: Tensor


def readable(samples: Sequence[Sample], prompts: Sequence[list[int] | None], words: Words) -> Readable:
    """Replace what a teacher with these words cannot read, and say where that begins."""
    filler = next(i for i in range(words.size) if i not in words.absent)
    read, known_prompts, valid, cut = [], [], [], []
    for sample, prompt in zip(samples, prompts, strict=True):
        known = words.known(sample.token_ids)
        in_prompt = known[: sample.prompt_length] if prompt is None else words.known(torch.tensor(prompt, dtype=torch.long))
        before = known[sample.prompt_length :].long().cumprod(0).bool() & bool(in_prompt.all())
        valid.append(before[sample.loss_mask[sample.prompt_length :]])
        cut.append(not bool(before.all()))
        read.append(replace(sample, token_ids=torch.where(known, sample.token_ids, filler)))
        known_prompts.append(
            None if prompt is None else [i if k else filler for i, k in zip(prompt, in_prompt.tolist(), strict=True)]
        )
    return Readable(read, known_prompts, torch.cat(valid), torch.tensor(cut))
