"""The optimizer, its schedule and its gradient clip, as one component of the configuration."""

import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

log = logging.getLogger(__name__)

SAMPLED = 1 << 16
"""Weights of each tensor from which a share is estimated."""


def movable(parameters: Iterable[Tensor], size: float, dtype: torch.dtype | None = None) -> float:
    """The share of weights that an update of this size changes; the others are rounded back to their value.

    An update of AdamW changes a weight by about the learning rate, whatever its gradient. bfloat16 has 8 bits for a weight of
    0.02, so smaller updates than 0.00006 do not change it, however many there are.

    Args:
        dtype: of the weights in training; None takes their own.
    """
    moved = counted = 0.0
    for parameter in parameters:
        local = parameter.detach()
        weights = (local.to_local() if hasattr(local, "to_local") else local).flatten()
        weights = weights[:: max(1, len(weights) // SAMPLED)].to(dtype or parameter.dtype)
        share = sum(((weights.double() + change).to(weights.dtype) != weights).double().mean() for change in (size, -size)) / 2
        if len(weights):
            moved, counted = moved + float(share) * parameter.numel(), counted + parameter.numel()
    return moved / max(counted, 1.0)


def rounding(parameters: Iterable[Tensor], lr: float, dtype: torch.dtype | None = None) -> str | None:
    """A warning with the share that an update of size `lr` changes, if weights of a 16-bit type are trained; else None."""
    low = [p for p in parameters if torch.finfo(dtype or p.dtype).bits < 32]
    if not low:
        return None
    name = str(dtype or low[0].dtype).removeprefix("torch.")
    return (
        f"weights are trained in {name}: an update of optim.lr={lr:g} moves {movable(low, lr, dtype):.1%} of them; elsewhere "
        "it is rounded away. trainer.precision=bf16-mixed with model.dtype=float32, or with adapter=lora, keeps every update."
    )


def adamw_8bit(
    params: Iterable[Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    min_8bit_size: int = 4096,
    paged: bool = False,
) -> Optimizer:
    """AdamW of bitsandbytes, whose averages are kept in 8 bits (arXiv 2110.02861).

    Args:
        params, lr, betas, weight_decay: as of `torch.optim.AdamW`.
        min_8bit_size: tensors of fewer elements keep averages in 32 bits.
        paged: whether the averages move to the host while a GPU is full.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise ValueError("optim=adamw_8bit needs a package: pip install bitsandbytes (or opd-lightning[quantized]).") from error
    kind = PagedAdamW8bit if paged else AdamW8bit
    return kind(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, min_8bit_size=min_8bit_size)


class Optim:
    """The optimizer with its learning rate, schedule and gradient clip.

    Args:
        optimizer: builds the optimizer from parameters and `lr`.
        lr: peak learning rate.
        clip_norm: largest norm of the gradient; None never clips.
        schedule: a name of transformers' `get_scheduler`, such as constant_with_warmup, cosine or linear.
        warmup_steps: optimizer steps of linear warm-up.

    Raises:
        ValueError: lr or clip_norm is not positive, warmup_steps is negative.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        lr: float,
        clip_norm: float | None = 1.0,
        schedule: str = "constant_with_warmup",
        warmup_steps: int = 0,
    ):
        if not lr > 0:
            raise ValueError(f"optim.lr={lr} must be positive.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"optim.clip_norm={clip_norm} must be positive; null never clips.")
        if warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={warmup_steps} must be at least 0.")
        self.optimizer, self.lr = optimizer, lr
        self.clip_norm, self.schedule, self.warmup_steps = clip_norm, schedule, warmup_steps

    def build(self, parameters: Iterable[Parameter], max_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Optimizer and schedule; `max_steps` is the horizon of schedules that end (-1: none)."""
        trained = [p for p in parameters if p.requires_grad]
        if message := rounding(trained, self.lr):
            log.warning(f"warning: {message}")
        optimizer = self.optimizer(trained, lr=self.lr)
        horizon = None if max_steps < 0 else max_steps
        return optimizer, get_scheduler(self.schedule, optimizer, self.warmup_steps, horizon)

    def clip(self, parameters: Iterable[Parameter]) -> torch.Tensor:
        """Clip the gradient in place; returns its norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(parameters, math.inf if self.clip_norm is None else self.clip_norm)
