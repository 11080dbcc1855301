"""Attention of 16-bit tensors over short texts on a CPU, by plain products: torch's kernel for it is slow there.

Behind one token, four to six times as fast; with gradients over a hundred tokens, twice. Longer texts, other dtypes and other
devices are left to transformers' `sdpa`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_texts_on_cpu"
LONGEST = 256
"""Tokens of a text whose attention is computed by products; the matrix of all pairs exists."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' `sdpa` gives it: [B, T, heads, width] of a query [B, heads, T, width].

    Args:
        key, value [B, fewer heads, L, width]: each serves the same number of the query's heads.
        mask [B, 1 or heads, T, L]: true or 0 where a token is seen; None where all before it are.
    """
    tokens, length = query.shape[2], key.shape[2]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = query.device.type == "cpu" and dtype.itemsize == 2 and not dropout and options.get("position_bias") is None
    if not plain or (tokens > 1 and max(tokens, length) > LONGEST) or (mask is None and tokens not in (1, length)):
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, **options)
    scaling, causal = options.get("scaling"), options.get("is_causal")
    if mask is None and tokens > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    # One token's products are made in float32, which is fastest for few rows.
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attended(query, key, value, mask, factor, torch.float32 if tokens == 1 else dtype).to(dtype), None


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """Attention by products in a dtype, with sums in float32: [B, T, heads, width]."""
    batch, heads, tokens, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        rows = (query.to(dtype) * scaling).reshape(batch, groups, heads // groups * tokens, width)
        scores = torch.matmul(rows, key.to(dtype).transpose(2, 3)).view(batch, heads, tokens, length)
        if mask is not None:
            seen, lowest = mask[..., :length], torch.finfo(dtype).min  # finite, for padding may see nothing
            scores = scores.masked_fill(~seen, lowest) if seen.dtype == torch.bool else scores + seen
        shares = scores.softmax(-1, dtype=torch.float32).to(dtype).view(batch, groups, -1, length)
        out = torch.matmul(shares, value.to(dtype)).view(batch, heads, tokens, value.shape[-1])
    return out.transpose(1, 2).contiguous()


@contextmanager
def short_attention(lm: PreTrainedModel) -> Iterator[None]:
    """A context in which a model that attends by `sdpa` on a CPU uses `attention`; the backward pass belongs into it too."""
    config = lm.config
    if lm.device.type != "cpu" or config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
