"""Padding to the left of a prompt, which a few recurrent models read as if it were text."""

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

log = logging.getLogger(__name__)

KNOWN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""What was found of a model."""


@torch.no_grad()
def reads_padding(lm: PreTrainedModel, prompt: Sequence[int]) -> bool:
    """Does a model continue a prompt otherwise when masked tokens stand before it?

    Found by trying, once for each model: the first tokens of the prompt, alone and behind eight masked copies of its last one.
    The pad token itself may have an embedding of zeros today.

    Args:
        lm: in eval mode; it writes two tokens, the second from its cache.
    """
    if lm not in KNOWN:
        ids = torch.tensor([list(prompt[:4])], device=lm.device)
        mask, padding = torch.ones_like(ids), ids[:, -1:].expand(1, 8)
        alone = _greedy(lm, ids, mask)
        padded = _greedy(lm, torch.cat([padding, ids], 1), torch.cat([torch.zeros_like(padding), mask], 1))
        spread = (alone - alone.mean(-1, keepdim=True)).square().mean()
        KNOWN[lm] = bool((padded - alone).square().mean() > 0.05**2 * spread)  # rounding is far below
        if KNOWN[lm]:
            log.warning(
                f"warning: {type(lm).__name__} reads the padding before a prompt, so prompts of unequal length are written one "
                "length at a time, which is slower."
            )
    return KNOWN[lm]


def _greedy(lm: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [2, V] of two greedy tokens behind ids [1, L], in float32."""
    config = GenerationConfig(
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    restore, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        out = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)  # type: ignore[operator]
    finally:
        lm.generation_config = restore
    return torch.cat(out.logits).float()
