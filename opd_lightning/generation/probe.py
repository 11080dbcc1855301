"""Tests of engines: log-probabilities of a few tokens against those of the trained model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.types import Completion
from opd_lightning.utils.seeds import derive_seed
from opd_lightning.utils.vocabulary import ValidIds


@torch.no_grad()
def reading_gap(
    lm: PreTrainedModel, prompt: Sequence[int], completion: Completion, process: Callable[[Any, Any], Tensor]
) -> float:
    """Nats per token, mean absolute, between a completion's log-probabilities when drawn and in one pass without a cache.

    Args:
        process: the logits processors that the tokens were drawn with.
    """
    row = torch.tensor([[*prompt, *completion.token_ids]], device=lm.device)
    logits = lm(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = row[0, len(prompt) :, None]
    read = process(row, logits).log_softmax(-1).gather(-1, chosen).squeeze(-1).cpu()
    return float((read - torch.tensor(completion.logprobs, dtype=read.dtype)).abs().mean())


def written_logprobs(logits: Tensor, rows: Tensor) -> Tensor:
    """Log-probabilities [rows, L - 1] of each token but the first, from the logits [rows, L - 1, V] that predict them."""
    return logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)


class Probe:
    """Rows of random tokens, the same at every comparison; improbable tokens make a small difference of weights visible.

    Args:
        valid_ids: the student's.
        rows, length: the number and the length of the rows.
    """

    def __init__(self, valid_ids: ValidIds, rows: int = 2, length: int = 16):
        draw = torch.Generator().manual_seed(derive_seed(0, "probe"))
        ids = torch.arange(valid_ids.size)
        ids = ids[valid_ids.contains(ids)]
        self.rows = ids[torch.randint(0, len(ids), (rows, length), generator=draw)].tolist()

    @torch.no_grad()
    def of(self, student: Any) -> Tensor:
        """The log-probabilities [rows, length - 1] of a model in this process, on the CPU."""
        with student.reading() as lm:
            rows = torch.tensor(self.rows, device=lm.device)
            return written_logprobs(lm(input_ids=rows).logits.float()[:, :-1], rows).cpu()

    def compare(self, student: Any, logprobs: Callable[[Sequence[Sequence[int]]], list[list[float]]], bound: float) -> float:
        """The mean absolute difference, in nats per token.

        Args:
            student: the trained model.
            logprobs: returns the engine's log-probability of each token of its rows, except the first.
            bound: the largest difference that is accepted.

        Raises:
            ValueError: the difference exceeds the bound.
        """
        engine_logprobs = torch.tensor(logprobs(self.rows))
        difference = float((engine_logprobs - self.of(student)).abs().mean())
        if not difference <= bound:
            raise ValueError(
                f"the engine's log-probabilities differ by {difference:.2g} nats per token from the student's "
                f"(generator.max_mismatch={bound:g}): its weights are not those of the last update, it serves another model, "
                "or it computes the model differently. Serve the student's start model, take generator=transformers, give both "
                "the same dtype, or raise the bound."
            )
        return difference
