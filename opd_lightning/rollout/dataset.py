"""The data set writes: reference completions, as SFT and offline distillation take them."""

from collections.abc import Mapping

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from opd_lightning.models import Student
from opd_lightning.rollout.reuse import NOBODY, check_reuse, counted
from opd_lightning.teachers.local import Scorer
from opd_lightning.types import Prompts, Rollout


class DatasetRollout:
    """Each prompt's reference completion, closed with EOS.

    Args:
        tokenizer: the student's.
        max_new_tokens: longer completions are cut there and count as truncated.
        samples_per_prompt: must be 1; more would be copies.
        updates_per_rollout, truncated: as for the student's rollouts.
    """

    on_policy = False
    student_writes = False
    reads_references = True
    sources: frozenset[str] = frozenset()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        samples_per_prompt: int = 1,
        updates_per_rollout: int = 1,
        truncated: str = "keep",
    ):
        if samples_per_prompt != 1:
            raise ValueError(
                f"rollout.samples_per_prompt={samples_per_prompt} repeats the same reference; use 1, or rollout=student."
            )
        check_reuse(updates_per_rollout, truncated)
        self.tokenizer, self.max_new_tokens, self.samples = tokenizer, max_new_tokens, samples_per_prompt
        self.updates_per_rollout, self.truncated = updates_per_rollout, truncated

    def __call__(self, student: Student, prompts: Prompts, seed: int, scorers: Mapping[str, Scorer] = NOBODY) -> Rollout:
        """The reference completions; `seed` is not used.

        Raises:
            ValueError: an example has no completion.
        """
        device = student.lm.device
        rows, truncated = [], []
        for example in prompts.examples:
            if example.completion is None:
                raise ValueError(f"example {example.id} has no completion to imitate; rollout=dataset needs one for each.")
            row = [*self.tokenizer(example.completion, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            rows.append(torch.tensor(row[: self.max_new_tokens]))
            truncated.append(len(row) > self.max_new_tokens)
        lengths = torch.tensor([len(r) for r in rows], device=device)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(device)
        cut = torch.tensor(truncated, device=device)
        return Rollout(prompts, ids, lengths, cut, counted(cut, self.truncated), ["dataset"] * len(rows))
