"""A mixture: the student writes some completions, the data set or the teacher the others."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from opd_lightning.models import Student
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.teachers.local import Scorer
from opd_lightning.types import Prompts, Rollout, RolloutPolicy
from opd_lightning.utils.seeds import derive_seed


class MixtureRollout:
    """Each prompt is the student's with probability `share`, else the other writer's (GKD's lambda, arXiv 2306.13649).

    GKD draws once per batch; drawing per prompt has the same expectation and less variance.

    Args:
        other: the other writer; its completions per prompt must be as many.
        share: of the prompts that the student answers.
        tokenizer, max_new_tokens, temperature, top_p, top_k, samples_per_prompt, updates_per_rollout, truncated: as for
            `StudentRollout`.
    """

    on_policy = False
    student_writes = True
    reads_references = False  # these two follow the other writer's
    sources: frozenset[str] = frozenset()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        other: RolloutPolicy,
        share: float,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        samples_per_prompt: int = 1,
        updates_per_rollout: int = 1,
        truncated: str = "keep",
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"rollout.share={share} must lie in [0, 1]: 1 leaves every prompt to the student.")
        theirs = getattr(other, "samples", samples_per_prompt)
        if theirs != samples_per_prompt:
            raise ValueError(
                f"rollout.samples_per_prompt={samples_per_prompt}, but the other writer makes {theirs}; use {theirs}."
            )
        self.student = StudentRollout(
            tokenizer, max_new_tokens, temperature, top_p, top_k, samples_per_prompt, updates_per_rollout, truncated
        )
        self.other, self.share, self.pad = other, share, tokenizer.pad_token_id
        self.reads_references, self.sources = other.reads_references, other.sources
        self.updates_per_rollout, self.max_new_tokens = updates_per_rollout, max_new_tokens

    def __call__(self, student: Student, prompts: Prompts, seed: int, scorers: Mapping[str, Scorer]) -> Rollout:
        """One completion per prompt and sample, in the order of the prompts."""
        draw = torch.rand(len(prompts.ids), generator=torch.Generator().manual_seed(derive_seed(seed, "mixture")))
        own = (draw < self.share).tolist()
        parts, order = [], []
        for writer, mine in ((self.student, True), (self.other, False)):
            chosen = [i for i, is_own in enumerate(own) if is_own == mine]
            if chosen:
                some = Prompts([prompts.examples[i] for i in chosen], [prompts.ids[i] for i in chosen])
                parts.append(writer(student, some, seed, scorers))
                order += chosen
        return interleave(parts, order, self.pad)


def interleave(parts: list[Rollout], order: list[int], pad: int) -> Rollout:
    """One rollout of several, whose prompts, read one part after the other, stood at `order` in the batch."""
    samples = parts[0].samples
    assert all(part.samples == samples for part in parts), "parts of a mixture need equally many completions per prompt"
    place = {prompt: i for i, prompt in enumerate(order)}
    rows = [place[prompt] * samples + s for prompt in range(len(order)) for s in range(samples)]
    longest = max(part.ids.shape[1] for part in parts)

    def joined(columns: list[Tensor]) -> Tensor:
        return torch.cat(columns)[rows]

    examples = [example for part in parts for example in part.prompts.examples]
    ids = [prompt for part in parts for prompt in part.prompts.ids]
    writers = [writer for part in parts for writer in part.writers]
    return Rollout(
        prompts=Prompts([examples[r] for r in rows], [ids[r] for r in rows]),
        ids=joined([F.pad(part.ids, (0, longest - part.ids.shape[1]), value=pad) for part in parts]),
        lengths=joined([part.lengths for part in parts]),
        truncated=joined([part.truncated for part in parts]),
        counts=joined([part.counts for part in parts]),
        writers=[writers[r] for r in rows],
        samples=samples,
        teacher_tokens=sum(part.teacher_tokens for part in parts),
        teacher_flops=sum(part.teacher_flops for part in parts),
    )
