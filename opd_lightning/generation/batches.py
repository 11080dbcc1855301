"""Prompts that a model can continue in one batch: a few recurrent models read padding as text, or mix the rows of a batch."""

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from opd_lightning.generation.decoding import Reader
from opd_lightning.generation.key_values import is_plain

log = logging.getLogger(__name__)

DETECTED: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""The result of `batch_support` for each model."""

CACHES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""The result of `cache_support` for each model."""

GROUPING = {"equal": "prompts of one length at a time", "single": "one prompt at a time"}
"""How completions are generated where one batch cannot hold all prompts, by the result of `batch_support`."""


@torch.no_grad()
def batch_support(lm: PreTrainedModel, prompt: Sequence[int]) -> str:
    """The prompts that a model continues in a batch as it does alone: "any", those of "equal" length, or a "single" one.

    Tested once for each model: the first tokens of the prompt, alone, and behind masked copies of the last one (the pad token
    may have an embedding of zeros) beside a longer row.

    Args:
        lm: in eval mode; it generates two tokens, the second from its cache.
    """
    if lm not in DETECTED:
        ids = torch.tensor([list(prompt[:4])], device=lm.device)
        other, padding = ids.flip(1), ids[:, -1:].expand(1, 8)
        alone, mask = _greedy(lm, ids), torch.ones(2, 8 + ids.shape[1], dtype=torch.long, device=lm.device)
        mask[0, :8] = 0
        longer = torch.cat([other[:, :1].expand(1, 8), other], 1)
        padded = _greedy(lm, torch.cat([torch.cat([padding, ids], 1), longer]), mask)
        kind = "any" if _same(padded, alone) else "equal" if _same(_greedy(lm, torch.cat([ids, other])), alone) else "single"
        DETECTED[lm] = kind
        if kind != "any":
            fault = "reads the padding before a prompt" if kind == "equal" else "mixes the rows of a batch"
            log.warning(
                f"warning: {type(lm).__name__} {fault}, so completions are written for {GROUPING[kind]}, which is slower."
            )
    return DETECTED[lm]


@torch.no_grad()
def cache_support(lm: PreTrainedModel, prompt: Sequence[int]) -> bool:
    """Whether rows of a model's cache can be chosen and repeated: `decoding` gives the logits that `generate` gives.

    Tested once for each model: a prompt behind padding is read beside another, and goes on without it.

    Args:
        lm: in eval mode; `batch_support` is "any".
    """
    if lm not in CACHES:
        ids = torch.tensor([list(prompt[:4])], device=lm.device)
        row, mask = torch.cat([ids[:, :1].expand(1, 3), ids], 1), torch.ones(2, 3 + ids.shape[1], device=lm.device).long()
        mask[1, :3] = 0
        try:
            reader = Reader(lm, row.expand(2, -1), mask)
            first = reader.prefill()[1:]
            if CACHES.setdefault(lm, is_plain(reader.cache)):
                reader.select(torch.ones(1, dtype=torch.long, device=lm.device))
                found = torch.cat([first, reader.step(first.argmax(-1))])
                CACHES[lm] = _same(found, _greedy(lm, ids))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            CACHES[lm] = False  # it takes its inputs or keeps its cache in another way
    return CACHES[lm]


def _same(logits: Tensor, expected: Tensor) -> bool:
    """Whether the logits agree up to rounding."""
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean()
    return not bool((logits - expected).square().mean() > 0.05**2 * spread)


def _greedy(lm: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [2, V] of two greedy tokens behind the first row of ids [B, L], in float32."""
    config = GenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    restore, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        mask = torch.ones_like(ids) if mask is None else mask
        out = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)  # type: ignore[operator]
    finally:
        lm.generation_config = restore
    return torch.stack([logits[0] for logits in out.logits]).float()
