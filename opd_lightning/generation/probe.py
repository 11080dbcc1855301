"""A probe of an engine's weights: its log-probabilities of a few tokens against the student's."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from opd_lightning.utils.seeds import derive_seed


class Probe:
    """Rows of random words, the same at every comparison of a run; improbable words make a difference of weights large.

    Args:
        tokenizer: the student's.
        bound: the largest mean difference, in nats per token.
        field: of the bound, for the error.
        rows, length: how many words are compared.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bound: float, field: str, rows: int = 2, length: int = 16):
        draw = torch.Generator().manual_seed(derive_seed(0, "probe"))
        self.rows = torch.randint(0, len(tokenizer), (rows, length), generator=draw).tolist()
        self.bound, self.field = bound, field

    def compare(self, student, logprobs: Callable[[Sequence[Sequence[int]]], list[list[float]]]) -> float:
        """The mean absolute difference.

        Args:
            student: the trained model.
            logprobs: gives the engine's log-probability of each token of some rows but the first.

        Raises:
            ValueError: it exceeds the bound.
        """
        found = torch.tensor(logprobs(self.rows))
        with student.evaluating() as lm:
            rows = torch.tensor(self.rows, device=lm.device)
            logits = lm(input_ids=rows).logits.float()[:, :-1]
        expected = logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1).cpu()
        difference = float((found - expected).abs().mean())
        if not difference <= self.bound:
            raise ValueError(
                f"the engine's log-probabilities differ by {difference:.3f} nats per token from the student's "
                f"({self.field}={self.bound}): its weights are not those of the last update, or it computes the model "
                "otherwise. Take generator=transformers, give the engine the student's dtype, or raise the bound."
            )
        return difference
