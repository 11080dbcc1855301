"""Quantized parameters: their shapes, and the values that they stand for. Others pass unchanged."""

from typing import Any

import torch
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is stored in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None and not hasattr(module, "base_layer")


def plain_shape(parameter: Any) -> torch.Size:
    """The shape of the weight; 4 bits are stored two to a byte, in one column."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else torch.Size(state.shape)


def plain_dtype(parameter: Any) -> torch.dtype:
    """The dtype of the weight before it was quantized."""
    state = getattr(parameter, "quant_state", None)
    return parameter.dtype if state is None else state.dtype


def plain_weight(parameter: Any) -> Tensor:
    """The values of the weight, without gradient."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.detach(), state)
