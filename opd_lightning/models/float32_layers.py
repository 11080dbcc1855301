"""Linear layers of float32 on a CPU, multiplied by oneDNN forward and backward; see `utils.products`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from opd_lightning.utils.products import product, suits


@contextmanager
def fast_float32(model: nn.Module) -> Iterator[None]:
    """A context in which a model's large linear layers are multiplied by oneDNN; the backward pass belongs into it too.

    Nothing changes under autocast, on GPUs, for other dtypes and for sharded weights.
    """
    changed: list[nn.Module] = []
    try:
        if not torch.is_autocast_enabled("cpu"):
            for module in model.modules():
                if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module) and suits(module.weight):  # type: ignore[arg-type]
                    module.forward = forward_of(module)  # type: ignore[method-assign]
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def forward_of(module: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer's forward pass by oneDNN."""

    def forward(inputs: Tensor) -> Tensor:
        weight = module.weight.t() if type(module) is Conv1D else module.weight
        if inputs.dtype != torch.float32:
            return nn.functional.linear(inputs, weight, module.bias)
        return _Linear.apply(inputs, weight, module.bias)

    return forward


class _Linear(torch.autograd.Function):
    """inputs [..., in] times a weight [out, in], transposed, plus a bias [out] or None."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needed = ctx.needs_input_grad
        grad_inputs = product(grad, weight.t()) if needed[0] else None
        grad_weight = product(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t()) if needed[1] else None
        return grad_inputs, grad_weight, rows.sum(0) if needed[2] else None
