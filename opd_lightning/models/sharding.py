"""FSDP2: the student's weights sharded over devices, and gathered for generation and scoring."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from opd_lightning.losses.objective import Objective
from opd_lightning.models.backbone import backbone
from opd_lightning.types import Sequences, Tokens


class Sharding:
    """The devices that trainer=fsdp2 spreads weights over, for what is beside the student: teachers, averages.

    Args:
        mesh: the devices.

    Attributes:
        gathers: contexts in which each device has one of these as a whole.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.gathers: list[Callable[[], AbstractContextManager[Any]]] = []

    def spread(self, model: Any, offload: bool) -> None:
        """Spread a `Frozen` model, in place, layer by layer; each layer is gathered for its forward pass alone.

        Args:
            offload: whether each device keeps its part on the host.
        """
        on_gpu = self.mesh.device_type != "cpu"
        policy = CPUOffloadPolicy(pin_memory=on_gpu) if offload else OffloadPolicy()
        for layer in text_layers(model.lm):
            fully_shard(layer, mesh=self.mesh, offload_policy=policy)
        fully_shard(model, mesh=self.mesh, offload_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(model, "hidden")
        self.gathers.append(model.eval_mode)
        with torch.no_grad():  # the first pass, which has to begin with the whole model
            model.hidden(one_token(torch.device(self.mesh.device_type)))
        model.reshard()

    def own(self, tensor: Tensor) -> Tensor:
        """This device's part of a tensor that all devices have, on its device; one that is spread stays as it is."""
        if isinstance(tensor, DTensor):
            return tensor
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None)

    def most(self, number: int) -> int:
        """The greatest of all devices' numbers."""
        found = torch.tensor(number, device=self.mesh.device_type)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.get_group())
        return int(found)


def one_token(device: torch.device) -> Sequences:
    """A batch of one token, of which nothing is learned."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    return Sequences(zero, torch.ones_like(zero), zero[0, :0], zero[0, :0])


def shard(student: nn.Module, strategy: ModelParallelStrategy, objective: Objective) -> None:
    """Shard each layer and the rest of the student, in place.

    It is converted to the dtype of trainer.precision first, for FSDP2 keeps the dtype of the gradients that it begins with.

    A first forward pass through the full model registers the layers as its parts: a layer that is called first, as decoding
    does, would become the root.
    """
    strategy.precision_plugin.convert_module(student)
    assert strategy.device_mesh is not None
    mesh = strategy.device_mesh["data_parallel"]
    for layer in text_layers(student.lm):  # type: ignore[arg-type]
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    zero = torch.zeros(1, 1, dtype=torch.long, device=mesh.device_type)
    tokens = Tokens(zero[0], zero[0], torch.ones(1, device=zero.device))
    with torch.no_grad():
        sequences = Sequences(zero.expand(1, 2), torch.ones_like(zero).expand(1, 2), zero[0], zero[0])
        student(sequences, tokens, {}, objective.log_prob)


def text_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """The layers of the model's text decoder, never those of a tower for images or sound, nor the experts of a layer.

    They are the list of modules in the decoder with as many entries as the text configuration has layers, of a class that
    transformers keeps on one device; where there is none, the longest list.
    """
    decoder, whole = lm.get_decoder(), set(lm._no_split_modules or ())
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    count = getattr(lm.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    fitting = [m for m in lists if len(m) == count]
    kept_whole = [m for m in fitting if {type(layer).__name__ for layer in m} <= whole]
    found = kept_whole or fitting or sorted(lists, key=len, reverse=True)
    return list(found[0]) if found else []


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """A context with unsharded weights, in which no device waits for another."""
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)


def align(module: nn.Module, lm: PreTrainedModel) -> None:
    """Run a forward pass of one token on every device, so that the order of the last forward passes is the same.

    FSDP2 prefetches weights for a backward pass in the order of the forward passes before it, those of decoding included.
    Devices with different orders would wait for each other for ever.
    """
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        backbone(lm)(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(lm.parameters()).device))


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded over devices."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
