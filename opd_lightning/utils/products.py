"""Matrix products of float32 by oneDNN: on AMD processors twice as fast as MKL, which torch takes for this dtype by itself."""

from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SMALLEST = 2**15
"""Matrices with fewer elements are multiplied by torch: a call costs more than the product."""


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs [..., in] times a weight [out, in], transposed, in oneDNN; without gradient. Views need no copy."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def suits(*matrices: Tensor) -> bool:
    """Whether oneDNN multiplies these matrices faster: large ones of float32 on a CPU, none of them sharded."""
    return all(
        matrix.device.type == "cpu" and matrix.dtype == torch.float32 and not isinstance(matrix, DTensor) for matrix in matrices
    ) and (max(matrix.numel() for matrix in matrices) >= SMALLEST and onednn(torch.float32))


@cache
def onednn(dtype: torch.dtype) -> bool:
    """Whether this machine's torch multiplies by oneDNN in a dtype: float32, or bfloat16 where the processor has it."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight, inputs = torch.eye(64, dtype=dtype), torch.arange(64).to(dtype).expand(2, 3, -1)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        return all(torch.equal(product(inputs, matrix), inputs) for matrix in (weight, weight.t(), packed))
    except (AttributeError, RuntimeError, TypeError):  # these operators are internal, and may go
        return False
