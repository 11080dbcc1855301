"""Packed weights: copies of a model's matrices in the layout and the dtype in which the processor multiplies fastest.

On CPUs, oneDNN's own layout, in which a product of few rows reads its weights at the memory's speed. Under autocast, in the
narrow dtype: autocast would cast the weights anew in every forward pass. Norms, embeddings and sums stay as they are, so
autocast's results are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opd_lightning.utils.products import SMALLEST, onednn, product


@contextmanager
def packed(lm: PreTrainedModel) -> Iterator[None]:
    """A context in which a model's linear layers use packed copies of their present weights, without gradients.

    It changes nothing where packing brings nothing: a GPU without autocast, or a CPU build without oneDNN.
    """
    changed: list[nn.Module] = []
    try:
        for module in lm.modules():
            if (product := packed_product(module)) is not None:
                module.forward = product  # type: ignore[method-assign]
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def packed_product(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The product of a linear layer with a packed copy of its weight; None where it stays as it is."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module) or isinstance(module.weight, DTensor):
        return None
    weight: Any = module.weight
    if weight.numel() < SMALLEST or not weight.is_floating_point():
        return None
    weight = weight.detach().t() if type(module) is Conv1D else weight.detach()
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr, operator]
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    narrow = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if kind == "cpu" and onednn(dtype):
        return by_onednn(narrow, bias)
    if dtype == weight.dtype:
        return None
    return lambda inputs: linear(inputs.to(dtype), narrow, bias)


ROWS = 8
"""The number of rows that the layout is made for; others are multiplied as well, hardly slower."""


def by_onednn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The product with a weight [out, in] in oneDNN's layout."""
    dtype = weight.dtype
    layout = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)

    def multiply(inputs: Tensor) -> Tensor:
        return product(inputs if inputs.dtype == dtype else inputs.to(dtype), layout, bias)

    return multiply
