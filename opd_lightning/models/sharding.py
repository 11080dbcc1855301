"""FSDP2: the student's weights sharded over devices, and gathered for generation and scoring."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from opd_lightning.losses.objective import Objective
from opd_lightning.models.backbone import backbone
from opd_lightning.types import Sequences, Tokens


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
