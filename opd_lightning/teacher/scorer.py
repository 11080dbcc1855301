"""The scorer: a teacher's weights behind a teacher's prompt, reading the very token ids that the student wrote."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.batching import packed_index, plan_micro_batches
from opd_lightning.data import encode_chat
from opd_lightning.generate import Completions, Sampling, complete
from opd_lightning.models import Student
from opd_lightning.seeds import seeded
from opd_lightning.types import LogitSource, Prompts, Rollout, join


class Scorer:
    """A source of next-token distributions on completions, and of completions.

    Args:
        weights: a weights policy; see `weights.py`.
        context: what it is shown; see `opd_lightning.context`.
        tokenizer: the student's.
    """

    def __init__(self, weights, context, tokenizer: PreTrainedTokenizerBase):
        self.weights, self.context, self.tokenizer = weights, context, tokenizer

    def score(self, student: Student, rollout: Rollout, micro_tokens: int | None) -> tuple[LogitSource, int]:
        """Read all completions of a rollout.

        Args:
            student: for policies whose weights are the student's.
            micro_tokens: padded tokens per forward pass; None reads everything at once.

        Returns:
            The distributions on the packed completion tokens of the whole rollout, and the number of tokens read.
        """
        prompts = self.prompt_ids(rollout.prompts)
        lengths = rollout.lengths.tolist()
        totals = [len(p) + n for p, n in zip(prompts, lengths, strict=True)]
        hidden: Tensor | None = None
        for rows in plan_micro_batches(totals, micro_tokens):
            sequences = join([prompts[b] for b in rows], rollout.ids[rows], rollout.lengths[rows], self.tokenizer.pad_token_id)
            part = self.weights.read(student, sequences)
            if hidden is None:
                hidden = part.hidden.new_empty(sum(lengths), part.hidden.shape[-1])
            hidden[packed_index(rows, rollout.lengths)] = part.hidden
        assert hidden is not None
        return LogitSource(hidden, part.project, part.vocabulary), sum(totals)

    def write(self, student: Student, prompts: Prompts, sampling: Sampling, seed: int) -> tuple[Completions, int]:
        """Answer the prompts as this teacher reads them.

        Returns:
            One completion per prompt, drawn from `seed`, and the number of tokens that passed through the teacher.
        """
        prompt_ids = self.prompt_ids(prompts)
        with self.weights.lend(student) as lm, seeded(seed, lm.device):
            done = complete(lm, prompt_ids, sampling, self.tokenizer)
        return done, sum(map(len, prompt_ids)) + int(done.lengths.sum())

    def prompt_ids(self, prompts: Prompts) -> list[list[int]]:
        """The teacher's prompt of each row; adjacent rows of one example share it."""
        ids: list[list[int]] = []
        before = None
        for example in prompts.examples:
            same = before is not None and example is before
            options = self.context.template_options
            ids.append(ids[-1] if same else encode_chat(self.tokenizer, self.context(example), **options))
            before = example
        return ids
