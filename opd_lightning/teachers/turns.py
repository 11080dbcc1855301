"""Contexts before every reply of a conversation: what stands between the replies is rendered with the context in its last turn.

The student's tokens stay as they are, and so does the number of trainable tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from opd_lightning.data.conversations import exchanges_of
from opd_lightning.types import Attempt, Sample


def at_every_reply(teacher: Any, sample: Sample, own: Attempt | None, others: Sequence[Attempt]) -> Sample:
    """The sample with the teacher's context before each reply but the first, whose prompt is built apart.

    Args:
        teacher: has `context` and `renderer`.
        own, others: the judged attempts that the context reads.

    Raises:
        ValueError: the messages between the replies are not known, or the context changes turns before the last.
    """
    gaps = gaps_of(sample)
    if not gaps:
        return sample
    exchanges = exchanges_of(sample.turns)
    if len(exchanges) < len(gaps):
        raise ValueError(
            f"context.at=every: the messages between the replies of example {sample.example.id} are not known, as in recorded "
            "rollouts; choose context.at=first."
        )
    renderer = teacher.renderer.with_options(teacher.context.template_options)
    example, chat = sample.example, list(sample.example.messages)
    tools = [example.tools] if example.tools else []
    ids, mask, done = [sample.token_ids[: gaps[0][0]]], [sample.loss_mask[: gaps[0][0]]], len(sample.token_ids)
    ends = [start for start, _ in gaps[1:]] + [done]
    for (start, stop), end, (reply, *answers) in zip(gaps, ends, exchanges, strict=False):
        shown = teacher.context(replace(example, messages=[*chat, reply, *answers]), own, others)
        gap = sample.token_ids[start:stop]
        if shown is not None:
            if len(shown) <= len(answers) or shown[-len(answers) - 1] != reply:
                raise ValueError(
                    f"context.at=every: {type(teacher.context).__name__} changes more than the last turn of a chat; choose "
                    "context.at=first."
                )
            gap = torch.tensor(renderer.between(chat, reply, shown[-len(answers) :], *tools), dtype=gap.dtype)
        ids += [gap, sample.token_ids[stop:end]]
        mask += [sample.loss_mask.new_zeros(len(gap)), sample.loss_mask[stop:end]]
        chat += [reply, *answers]
    return replace(sample, token_ids=torch.cat(ids), loss_mask=torch.cat(mask), logprobs=None)


def gaps_of(sample: Sample) -> list[tuple[int, int]]:
    """Begin and end of the tokens between the replies."""
    mask: Tensor = sample.loss_mask
    own = mask.nonzero().squeeze(1).tolist()
    return [(a + 1, b) for a, b in pairwise(own) if b > a + 1]
