"""Weights of a model as its checkpoint would name them, for engines that hold a copy."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.models.adapters import dense
from opd_lightning.models.sharding import full_tensor


def full_weights(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, one at a time: whole where they are spread over devices, with an adapter's change in them.

    Tied weights come under each of their names: an engine that packs the output layer would otherwise keep the old one. Every
    device has to take part, for spread weights are gathered.
    """
    changes = dense(lm)
    for key, value in lm.state_dict().items():
        if ".lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")
        layer, _, kind = name.rpartition(".")
        whole = full_tensor(value.detach())
        if kind == "weight" and layer in changes:
            whole = (whole.float() + full_tensor(changes[layer]).to(whole.device)).to(whole.dtype)
        yield name, whole
