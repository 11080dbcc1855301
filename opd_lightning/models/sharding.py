"""FSDP2: the student's weights spread over devices, together again where it writes or is read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from opd_lightning.losses.objective import Objective
from opd_lightning.models.backbone import backbone
from opd_lightning.types import Sequences, Tokens


def shard(student: nn.Module, mesh: DeviceMesh, objective: Objective) -> None:
    """Shard each layer and the rest of the student, in place.

    A first forward pass through the whole tells the layers that they are part of one: a layer that is called first, as
    decoding does, would take itself for the root.
    """
    for layer in max((m for m in student.modules() if isinstance(m, nn.ModuleList)), key=len):
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    zero = torch.zeros(1, 1, dtype=torch.long, device=mesh.device_type)
    tokens = Tokens(zero[0], zero[0], torch.ones(1, device=zero.device))
    with torch.no_grad():
        sequences = Sequences(zero.expand(1, 2), torch.ones_like(zero).expand(1, 2), zero[0], zero[0])
        student(sequences, tokens, {}, objective.log_prob)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights inside, whatever the devices do there: no device waits for another while it decodes."""
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
    """Let every device read one token of what was gathered, so that all have used it last in the same way.

    FSDP2 fetches weights for a backward pass in the order of the forward passes before it, those of decoding included: a device
    that had nothing to write would fetch others than one that had, and both would wait for ever.
    """
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        backbone(lm)(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(lm.parameters()).device))


def full_tensor(tensor: Tensor) -> Tensor:
    """A number that may be spread over devices, as each device's own."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
