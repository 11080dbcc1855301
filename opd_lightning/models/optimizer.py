"""The optimizer, its schedule and its gradient clip, as one component of the configuration."""

import math
from collections.abc import Callable, Iterable

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


class Optim:
    """How weights move.

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
        optimizer = self.optimizer([p for p in parameters if p.requires_grad], lr=self.lr)
        horizon = None if max_steps < 0 else max_steps
        return optimizer, get_scheduler(self.schedule, optimizer, self.warmup_steps, horizon)

    def clip(self, parameters: Iterable[Parameter]) -> torch.Tensor:
        """Clip the gradient in place; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, math.inf if self.clip_norm is None else self.clip_norm)
