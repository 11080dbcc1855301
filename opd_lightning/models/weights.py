"""Weights of a model under the names of its checkpoint, for engines that hold a copy."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.models.adapters import layers, sum_of, weight_of
from opd_lightning.models.quantized import plain_dtype, plain_shape, plain_weight
from opd_lightning.models.sharding import full_tensor


def full_weights(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The names and weights of a model, one at a time: unsharded, not quantized, with an adapter merged.

    Tied weights come under each of their names: an engine that packs the output layer would otherwise keep the old one. Every
    device must call it, for sharded weights are gathered.
    """
    changes = {id(weight_of(layer)): layer for layer in layers(lm).values()}
    for key, parameter in _merged_parameters(lm):
        value, layer = full_tensor(plain_weight(parameter)), changes.get(id(parameter))
        if layer is not None:
            change = full_tensor(sum_of(layer)).to(value.device)
            change = change.T if getattr(layer, "fan_in_fan_out", False) else change  # in the layer's own orientation
            value = (value.float() + change).to(value.dtype)
        yield key, value


def weight_shapes(lm: PreTrainedModel) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and full shape of what `full_weights` yields, in its order, without gathering."""
    for key, parameter in _merged_parameters(lm):
        yield key, plain_dtype(parameter), tuple(plain_shape(parameter))


def _merged_parameters(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model without its adapter's, each under every name that it would have in a merged model."""
    for key, parameter in lm.named_parameters(remove_duplicate=False):
        if ".lora_" not in key:
            yield key.replace(".base_layer.", "."), parameter
