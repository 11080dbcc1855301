"""Lightning's strategy of FSDP2, with checkpoints that resume on any number of devices."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from opd_lightning.models import shards
from opd_lightning.models.sharding import Sharding, full_tensor


class FSDP2ModelParallelStrategy(ModelParallelStrategy):
    """FSDP2; a checkpoint of it, of `trainer=ddp` or of one device is read by any of them, on any number of devices.

    The optimizer's state has the order of the optimizer's parameters, as without sharding.

    Args:
        data_parallel_size: devices that the weights are spread over.
        tensor_parallel_size: 1.
        save_distributed_checkpoint: whether each device writes its own part of weights and optimizer, into a folder beside the
            checkpoint's file; False gathers all on the first device's host, and writes one file.
    """

    @cached_property
    def sharding(self) -> Sharding:
        """The devices that weights are spread over."""
        assert self.device_mesh is not None
        return Sharding(self.device_mesh["data_parallel"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state: sharded, or full and on the first device's host alone."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        found = optimizer.state_dict()
        if self._save_distributed_checkpoint:
            return found
        for parameter, state in found["state"].items():
            full = {name: full_tensor(value).cpu() if torch.is_tensor(value) else value for name, value in state.items()}
            found["state"][parameter] = full if self.is_global_zero else {}
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; see `models.shards` for a sharded one."""
        if not self._save_distributed_checkpoint:
            checkpoint["teachers"] = self.full(checkpoint.get("teachers", {}))
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        path = Path(self.broadcast(filepath))
        shards.write(checkpoint, shards.folder_of(path.parent, checkpoint["global_step"]))
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def full(self, state: Any) -> Any:
        """A state whose sharded tensors are full and on the first device's host, and left out on the others."""
        if isinstance(state, DTensor):
            full = state.full_tensor()
            return full.cpu() if self.is_global_zero else None
        return {name: self.full(value) for name, value in state.items()} if isinstance(state, dict) else state

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and optimizers from a checkpoint, each device its own part; returns the rest of it.

        Raises:
            ValueError: it is of another model.
        """
        assert self.model is not None and self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        own = self.model.state_dict()
        states = {name: teacher.state_dict() for name, teacher in self.lightning_module.teachers.items()}  # type: ignore[union-attr, operator]
        teachers = dict(shards.sharded(states))
        shards.check_shapes(shards.shapes(checkpoint, path.parent), {name: value.shape for name, value in own.items()})
        numbered = [
            dict(zip(_ids(saved), _parameters(optimizer), strict=True))
            for saved, optimizer in zip(checkpoint["optimizer_states"], self.optimizers, strict=True)
        ]
        if shards.KEY in checkpoint:
            places: dict[Any, Any] = {"state_dict": own, "teachers": teachers} | dict(enumerate(numbered))
            shards.read(checkpoint, path.parent, lambda kind, at: places[kind].get(at))
        weights = {name: sharded_like(own[name], value) for name, value in checkpoint.pop("state_dict").items()}
        self.model.load_state_dict(weights, strict=self.lightning_module.strict_loading)
        for optimizer, parameters, saved in zip(self.optimizers, numbered, checkpoint.pop("optimizer_states"), strict=True):
            for parameter, state in saved["state"].items():
                state |= {name: sharded_like(parameters[parameter], value) for name, value in state.items()}
            optimizer.load_state_dict(saved)
        return checkpoint


def sharded_like(like: Tensor, value: Any) -> Any:
    """A full tensor sharded like another of its shape, without communication; anything else as it is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    full = value.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def _ids(saved: dict[str, Any]) -> list[int]:
    """The ids of parameters in an optimizer's state, in the order of its parameters."""
    return [parameter for group in saved["param_groups"] for parameter in group["params"]]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """An optimizer's parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
