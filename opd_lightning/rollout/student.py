"""The student writes: on-policy rollouts through transformers' generate."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from opd_lightning.generation.transformers import Sampling, complete
from opd_lightning.models import Student
from opd_lightning.rollout.reuse import NOBODY, check_reuse, counted
from opd_lightning.teachers.local import Scorer
from opd_lightning.types import Prompts, Rollout
from opd_lightning.utils.seeds import seeded


class StudentRollout:
    """The student samples completions of its own prompts.

    Args:
        tokenizer: the student's.
        max_new_tokens, temperature, top_p, top_k: see `Sampling`.
        samples_per_prompt: completions per prompt.
        updates_per_rollout: optimizer steps taken on one rollout.
        truncated: "keep" completions that ran into the token limit in the loss, or "mask" them.
    """

    on_policy = True
    student_writes = True
    reads_references = False
    sources: frozenset[str] = frozenset()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        samples_per_prompt: int = 1,
        updates_per_rollout: int = 1,
        truncated: str = "keep",
    ):
        if samples_per_prompt < 1:
            raise ValueError(f"rollout.samples_per_prompt={samples_per_prompt} must be at least 1.")
        if temperature == 0:
            raise ValueError("rollout.temperature=0 never explores; training rollouts need a positive one, 1.0 is usual.")
        check_reuse(updates_per_rollout, truncated)
        self.sampling = Sampling(max_new_tokens, temperature, top_p, top_k)
        self.tokenizer, self.samples = tokenizer, samples_per_prompt
        self.updates_per_rollout, self.truncated, self.max_new_tokens = updates_per_rollout, truncated, max_new_tokens

    def __call__(self, student: Student, prompts: Prompts, seed: int, scorers: Mapping[str, Scorer] = NOBODY) -> Rollout:
        """One completion per prompt and sample, drawn from `seed`."""
        prompts = prompts.repeat(self.samples)
        with student.evaluating() as lm, seeded(seed, lm.device):
            done = complete(lm, prompts.ids, self.sampling, self.tokenizer)
        counts, writers = counted(done.truncated, self.truncated), ["student"] * len(prompts.ids)
        return Rollout(prompts, done.ids, done.lengths, done.truncated, counts, writers, self.samples, done.logprobs)
