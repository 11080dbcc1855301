"""SpeculativeRollout: the student writes, and the teacher replaces the tokens that it would not write itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from opd_lightning.contracts import Generator, Provides
from opd_lightning.losses.head import fitted
from opd_lightning.rollout.base import check_options, single_turn
from opd_lightning.types import Completion, Cost, Prompts, Rendered, Rollout, Sample, SamplingParams
from opd_lightning.utils.seeds import derive_seed
from opd_lightning.utils.vocabulary import valid_ids_of


@dataclass
class Draft:
    """A completion in the making."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False


class SpeculativeRollout:
    """Interleaved sampling of student and teacher (speculative KD, arXiv 2410.11325, algorithm 1).

    The student writes a block of tokens; the first of them that is not among the teacher's `accept` most probable ones is
    replaced by a draw from the teacher, what stands behind it is dropped, and the student goes on from there. An accept of 0
    leaves every token to the teacher, the size of the vocabulary every token to the student.

    An engine is asked for the rest of each completion from its prompt and what is written, so each round reads that again; an
    engine with a prefix cache does not. The samples are neither the student's nor the teacher's, and are counted as the
    teacher's: losses that estimate from the student's own samples are refused, and its drafts are in no cost.

    Args:
        renderer: the student's.
        sampling: of a completion.
        accept: ranks of the teacher that the student's token may have; the paper takes 25.
        block: tokens that the student writes before the teacher reads them; it decides the cost alone.
        num_generations, num_iterations, mask_truncated_completions: as for `StudentRollout`.

    Raises:
        ValueError: accept < 0 or block < 1.
    """

    on_policy = False
    student_writes = False
    reads_references = False
    teachers = frozenset({"teacher"})
    requires: Provides = "full"

    def __init__(
        self,
        renderer: Any,
        sampling: SamplingParams,
        accept: int = 25,
        block: int = 16,
        num_generations: int = 1,
        num_iterations: int = 1,
        mask_truncated_completions: bool = False,
    ):
        if accept < 0 or block < 1:
            raise ValueError(f"rollout.accept={accept} must be at least 0, and rollout.block={block} at least 1.")
        check_options(num_generations, num_iterations)
        self.renderer, self.accept, self.block = renderer, accept, block
        self.sampling = replace(sampling, n=num_generations)
        self.num_iterations, self.mask_truncated = num_iterations, mask_truncated_completions

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, Any]) -> Rollout:
        """One sample per prompt and completion, drawn from `seed`."""
        n = self.sampling.n
        drafts = [Draft() for _ in range(n * len(prompts.examples))]
        cost, turn = Cost(), 0
        while any(self.unfinished(draft) for draft in drafts):
            cost += self.turn(drafts, prompts, derive_seed(seed, "speculative", turn), generator, teachers["teacher"])
            turn += 1
        samples = [self.sample(prompts, b, draft.ids, "stop" if draft.ended else "length") for b, draft in enumerate(drafts)]
        return Rollout(samples, cost)

    def unfinished(self, draft: Draft) -> bool:
        """Whether a draft goes on."""
        return not draft.ended and len(draft.ids) < self.sampling.max_new_tokens

    def sample(self, prompts: Prompts, b: int, ids: list[int], reason: Literal["stop", "length"]) -> Sample:
        """The sample of a draft's tokens."""
        group = b // self.sampling.n
        prompt, example = prompts.rendered[group], prompts.examples[group]
        return single_turn(example, group, prompt, Completion(ids, reason), "teacher", self.mask_truncated)

    def turn(self, drafts: Sequence[Draft], prompts: Prompts, seed: int, generator: Generator, teacher: Any) -> Cost:
        """Let the student write a block of each unfinished draft, and the teacher correct it; the teacher's cost."""
        limit = self.sampling.max_new_tokens
        going = [b for b, draft in enumerate(drafts) if self.unfinished(draft)]
        size = min(self.block, limit - min(len(drafts[b].ids) for b in going))
        asked = [Rendered([*prompts.rendered[b // self.sampling.n].token_ids, *drafts[b].ids]) for b in going]
        sampling = replace(self.sampling, max_new_tokens=size, n=1)
        done = generator.generate(asked, sampling, derive_seed(seed, "student"))
        written = [c.token_ids[: limit - len(drafts[b].ids)] for b, c in zip(going, done, strict=True)]
        scores = teacher.score(
            [self.sample(prompts, b, [*drafts[b].ids, *ids], "length") for b, ids in zip(going, written, strict=True)]
        )
        draws, at = torch.Generator().manual_seed(derive_seed(seed, "teacher")), 0
        for b, ids, completion in zip(going, written, done, strict=True):
            draft, start = drafts[b], at + len(drafts[b].ids)
            at = start + len(ids)
            accepted = self.correct(draft, ids, self.log_probs(scores, slice(start, at)), draws)
            whole = accepted and len(ids) == len(completion.token_ids)
            draft.ended = draft.ids[-1] in self.renderer.end_ids or (whole and completion.finish_reason == "stop")
        return scores.cost

    def log_probs(self, scores: Any, rows: slice) -> Tensor:
        """The teacher's log-probabilities [n, V] of the student's ids."""
        target, known = scores.chunk(rows), valid_ids_of(scores)
        if self.renderer.valid_ids is not None:
            target = fitted(target, known, self.renderer.valid_ids, torch.float32)
        return target.log_probs(1.0).log_p.cpu()

    def correct(self, draft: Draft, written: Sequence[int], log_t: Tensor, draws: torch.Generator) -> bool:
        """Extend a draft by what is written, up to and with the first token that the teacher replaces; whether none is.

        Args:
            written: n tokens of the student.
            log_t [n, V]: the teacher's log-probabilities at them; ids from V on are tokens that it lacks.
        """
        ids, width = torch.tensor(written), log_t.shape[-1]
        ranks = (log_t > log_t.gather(-1, ids.clamp(max=width - 1)[:, None])).sum(-1)
        refused = ((ranks >= self.accept) | (ids >= width)).nonzero().flatten().tolist()
        draft.ids.extend(written[: refused[0] if refused else len(written)])
        if refused:
            draft.ids.append(int(torch.multinomial(log_t[refused[0]].exp(), 1, generator=draws)))
        return not refused
