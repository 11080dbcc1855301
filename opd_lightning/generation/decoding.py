"""Decoding step by step: a prompt is read once for all of its samples, and finished rows leave the batch.

Each step draws random numbers for all rows, those of finished ones too, so that a row's tokens depend neither on which others
are left nor on whether this loop or transformers' `generate` writes them.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.generation.draws import drawn
from opd_lightning.generation.key_values import new_cache

Process = Callable[[Any, Any], Tensor]
"""Logits processors: ids [B, L] and logits [B, V] to the scores that tokens are drawn from."""


@dataclass(frozen=True)
class Shortcuts:
    """Work that decoding may leave out; the tokens are the same.

    Attributes:
        drop_finished: rows that have ended leave the batch.
        share_prefill: a prompt that occurs several times is read once.
    """

    drop_finished: bool = False
    share_prefill: bool = False

    def __bool__(self) -> bool:
        return self.drop_finished or self.share_prefill


PLAIN = Shortcuts()
"""No shortcuts: transformers' `generate`."""


class Reader:
    """A language model with the cache of a batch of rows.

    Args:
        lm: a model whose cache holds keys and values of each row, and nothing else; see `batches.cache_support`.
        ids, mask [B, L]: left-padded prompts; 0 masks padding.
    """

    def __init__(self, lm: PreTrainedModel, ids: Tensor, mask: Tensor):
        accepted = inspect.signature(lm.forward).parameters
        self.lm, self.mask, self.ids = lm, mask, ids
        self.positioned = "position_ids" in accepted
        self.last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache = new_cache(lm.config)

    def prefill(self) -> Tensor:
        """Logits [B, V] behind the prompts."""
        positions = self.mask.cumsum(-1).sub(1).clamp_min(0)
        return self.forward(self.ids, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] behind one more token of each row, tokens [B]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        return self.forward(tokens[:, None], self.mask.sum(1, keepdim=True) - 1)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        place = {"position_ids": positions} if self.positioned else {}
        out = self.lm(input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **place, **self.last)
        return out.logits[:, -1].to(copy=True, dtype=torch.float32)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, which may repeat."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


def distinct(prompt_ids: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The different prompts in their order, and the place of each prompt among them."""
    places: dict[tuple[int, ...], int] = {}
    order = [places.setdefault(tuple(prompt), len(places)) for prompt in prompt_ids]
    return list(places), order


def padded(prompt_ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded prompts and their mask [B, L]."""
    longest = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompt_ids):
        ids[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask[b, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def continued(
    lm: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    most: int,
    eos: Sequence[int],
    pad: int,
    process: Process,
    greedy: bool,
    shortcuts: Shortcuts,
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, T] of one completion of each prompt, padded behind their end, and log-probabilities [B, T], None if greedy.

    Args:
        most: of new tokens.
        process: logits processors.
    """
    rows, order = distinct(prompt_ids) if shortcuts.share_prefill else (list(prompt_ids), list(range(len(prompt_ids))))
    reader = Reader(lm, *padded(rows, pad, lm.device))
    count, ends = len(prompt_ids), torch.tensor(list(eos), device=lm.device)
    last, logits = reader.ids, reader.prefill()
    if len(rows) < count:
        every = torch.tensor(order, device=lm.device)
        reader.select(every)
        last, logits = last[every], logits[every]
    tokens = torch.full((count, most), pad, dtype=torch.long, device=lm.device)
    logprobs = torch.zeros(count, most, dtype=torch.float32, device=lm.device)
    left, ended = torch.arange(count, device=lm.device), torch.zeros(count, dtype=torch.bool, device=lm.device)
    for t in range(most):
        scores = process(last, logits)
        if greedy:
            token = scores.argmax(-1)
        else:
            token = drawn(scores.softmax(-1), count, left)
            logprobs[left, t] = scores.gather(1, token[:, None]).squeeze(1) - scores.logsumexp(-1)
        tokens[left, t] = token
        ended |= torch.isin(token, ends)
        if t + 1 == most or bool(ended.all()):
            break
        if shortcuts.drop_finished and bool(ended.any()):
            going = (~ended).nonzero().squeeze(1)
            reader.select(going)
            left, token, ended = left[going], token[going], ended[going]
        last = token[:, None]
        logits = reader.step(token)
    return tokens[:, : t + 1], None if greedy else logprobs[:, : t + 1]
