"""The reading of samples by a teacher: each completion behind the teacher's own prompt, and which tokens have a target."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd_lightning.rollout.conversation_text import conversation_text
from opd_lightning.teachers.readable import readable
from opd_lightning.teachers.turns import at_every_reply
from opd_lightning.types import Attempt, Sample
from opd_lightning.utils.vocabulary import ValidIds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Samples as a teacher reads them.

    Attributes:
        samples: B of them; ids that the teacher lacks are replaced.
        prompts: token ids of the teacher's prompt, by the index of each sample that is read; at least one is read.
        valid [N]: whether each trainable token has a target; None where all have.
        metrics: numbers [B] per sample, by name.
    """

    samples: Sequence[Sample]
    prompts: dict[int, list[int]]
    valid: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """The indices of the samples that are read."""
        return list(self.prompts)

    def length(self, row: int) -> int:
        """The tokens of a sample with the teacher's prompt."""
        return len(self.prompts[row]) + len(self.samples[row].token_ids) - self.samples[row].prompt_length

    @property
    def tokens(self) -> int:
        """The tokens that are read."""
        return sum(self.length(row) for row in self.prompts)


def read(teacher: Any, samples: Sequence[Sample], window: int, valid_ids: ValidIds | None, device: torch.device) -> Reading:
    """The samples behind the prompts of a teacher's context.

    Tokens are not valid where the context returns None, where a prompt made of attempts is too long, and behind a token that
    the teacher lacks; the metrics `valid`, `overlong` and `unreadable` count such samples.

    Args:
        teacher: has `context`, `renderer` and `rendering`; see `BaseTeacher`.
        window: most tokens that the teacher reads.
        valid_ids: the ids that it has, where the student has more; None where it has all.
    """
    prompts, valid, metrics = prompts_of(teacher, samples), None, {}
    if every := getattr(teacher.context, "at", "first") == "every":
        views = zip(samples, attempts_of(teacher, samples), strict=True)
        samples = [at_every_reply(teacher, sample, *pair) for sample, pair in views]
    if valid_ids is not None:
        part = readable(samples, prompts, valid_ids)
        samples, prompts, valid = part.samples, part.prompts, part.valid.to(device)
        metrics["unreadable"] = part.cut.float().to(device)
    completion_lengths = [len(sample.token_ids) - sample.prompt_length for sample in samples]
    limit = teacher.context.max_prompt_tokens or window
    # Prompts without attempts were checked before training; those from attempts may be too long for the teacher.
    unchecked = teacher.context.needs_rollouts or every
    fits = [
        p is not None and (not unchecked or len(p) <= min(window - n, limit))
        for p, n in zip(prompts, completion_lengths, strict=True)
    ]
    # Without such samples one is read all the same: other devices may wait for this one's shard of the weights.
    rows = [b for b, fit in enumerate(fits) if fit] or [0]
    ids = {b: (prompts[b] if fits[b] else None) or samples[b].token_ids[: samples[b].prompt_length].tolist() for b in rows}
    if not unchecked:
        return Reading(samples, ids, valid, metrics)
    too_long = [p is not None and not fit for p, fit in zip(prompts, fits, strict=True)]
    if any(too_long) and not any(fits):
        log.warning(
            "warning: every prompt of the teacher in this rollout is too long with its context, so nothing is "
            "learned from it; raise context.max_prompt_tokens, or lower rollout.sampling.max_new_tokens."
        )
    has_context = torch.tensor(fits, device=device)
    shown = torch.repeat_interleave(has_context, torch.tensor([sample.trainable for sample in samples], device=device))
    metrics |= {"valid": has_context.float(), "overlong": torch.tensor(too_long, device=device).float()}
    return Reading(samples, ids, shown if valid is None else shown & valid, metrics)


def prompts_of(teacher: Any, samples: Sequence[Sample]) -> list[list[int] | None]:
    """The teacher's prompt for each sample; None where the context returns None."""
    cache: dict[str, list[int]] = {}
    ids: list[list[int] | None] = []
    for sample, (own, others) in zip(samples, attempts_of(teacher, samples), strict=True):
        chat = teacher.context(sample.example, own, others)
        if chat is None:
            ids.append(None)
            continue
        key = repr((chat, sample.example.tools))
        if key not in cache:
            cache[key] = teacher.rendering(chat, sample.example.tools).token_ids
        ids.append(cache[key])
    return ids


def attempts_of(teacher: Any, samples: Sequence[Sample]) -> list[tuple[Attempt | None, list[Attempt]]]:
    """Each sample's judged completion, and the others of its prompt; None and none without verdicts or need of them.

    Of conversations all turns are the attempt's text, for a right last reply alone does not show how it came.
    """
    if not teacher.context.needs_rollouts:
        return [(None, [])] * len(samples)
    attempts = [
        None if s.verdict is None else Attempt(conversation_text(teacher.renderer, s, "assistant"), s.verdict) for s in samples
    ]
    groups = [sample.group for sample in samples]
    return [
        (own, [a for i, a in enumerate(attempts) if i != b and a is not None and groups[i] == groups[b]] if own else [])
        for b, own in enumerate(attempts)
    ]
