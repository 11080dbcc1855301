"""Prompts that a model can continue in one batch: a few recurrent models read padding as text, or mix the rows of a batch."""

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

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
        alone, mask = _continued(lm, ids), torch.ones(2, 8 + ids.shape[1], dtype=torch.long, device=lm.device)
        mask[0, :8] = 0
        longer = torch.cat([other[:, :1].expand(1, 8), other], 1)
        padded = _continued(lm, torch.cat([torch.cat([padding, ids], 1), longer]), mask)
        beside = torch.cat([ids, other])
        kind = "any" if _same(lm, padded, alone) else "equal" if _same(lm, _continued(lm, beside), alone) else "single"
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
                found = torch.cat([first, reader.step(ids[0, -1:])])
                CACHES[lm] = _same(lm, found, _continued(lm, ids))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            CACHES[lm] = False  # it takes its inputs or keeps its cache in another way
    return CACHES[lm]


def _same(lm: PreTrainedModel, logits: Tensor, expected: Tensor) -> bool:
    """Whether the logits agree up to rounding, which in 16 bits can change a logit by a tenth of their spread."""
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean()
    narrow = torch.is_autocast_enabled(lm.device.type) or lm.dtype.itemsize == 2
    return not bool((logits - expected).square().mean() > (0.3 if narrow else 0.05) ** 2 * spread)


class _Always(LogitsProcessor):
    """Lets one token be written, so that rounding never decides which."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = torch.full_like(scores, -torch.inf)
        out[:, self.token] = 0.0
        return out


def _continued(lm: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [2, V] behind the first row of ids [B, L], and behind that and its last token again, in float32."""
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
        out = lm.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Always(int(ids[0, -1]))]),
            synced_gpus=False,
        )
    finally:
        lm.generation_config = restore
    return torch.stack([logits[0] for logits in out.logits]).float()
