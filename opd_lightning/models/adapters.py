"""Adapters by PEFT: small weights beside frozen ones, put into the model in place, so that it stays the class it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def add(lm: PreTrainedModel, adapter) -> PreTrainedModel:
    """Put a fresh adapter into a model, in place; only it is trained, in float32.

    Args:
        adapter: a PEFT configuration, such as `peft.LoraConfig`.

    Raises:
        ValueError: PEFT cannot apply it, it adapts the output layer, whose weights the loss reads without it, or it trains or
            changes other weights than low-rank factors, which neither checkpoint nor export would have.
    """
    init = getattr(adapter, "init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"adapter.init_lora_weights={init!r} changes the frozen weights too, which a checkpoint does not hold; choose "
            "true or gaussian."
        )
    try:
        lm.add_adapter(adapter)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"adapter: PEFT cannot put it into {type(lm).__name__} ({error}).") from error
    if type(lm.get_output_embeddings()) is not nn.Linear:
        raise ValueError(
            f"adapter.target_modules={adapter.target_modules} adapts the output layer, which the loss applies by itself; leave "
            "it out (all-linear does)."
        )
    if not is_low_rank(lm):
        raise ValueError(
            "adapter trains more than low-rank factors; leave out modules_to_save and bias, or choose adapter=none."
        )
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return lm


def layers(lm: nn.Module) -> dict[str, Any]:
    """The layers that carry a low-rank adapter, by name."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}


def is_low_rank(lm: nn.Module) -> bool:
    """Is there an adapter, and are its low-rank factors all that is trained?"""
    factors = {id(f) for layer in layers(lm).values() for part in (layer.lora_A, layer.lora_B) for f in part.parameters()}
    return bool(factors) and {id(p) for p in lm.parameters() if p.requires_grad} <= factors


def is_fresh(lm: nn.Module) -> bool:
    """Does the model with its adapter do what it does without? True where every second factor is still zero."""
    return is_low_rank(lm) and not any(torch.any(f) for layer in layers(lm).values() for f in layer.lora_B.parameters())


@contextmanager
def switched_off(lm: PreTrainedModel) -> Iterator[None]:
    """The model without its adapter."""
    lm.disable_adapters()
    try:
        yield
    finally:
        lm.enable_adapters()


@contextmanager
def substituted(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values for some parameters, by name; their own come back afterwards to the bit."""
    parameters = dict(module.named_parameters())
    own = {name: parameters[name].data for name in tensors}
    try:
        for name, value in tensors.items():
            parameters[name].data = value.to(own[name].dtype)
        torch.clear_autocast_cache()  # autocast may have kept a cast of the own values
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value
        torch.clear_autocast_cache()


@contextmanager
def added(lm: nn.Module, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers, by name, that add x @ change.T to what they return: a change of weights [out, in] that no rounding swallows."""

    def hook(change: Tensor):
        return lambda _, inputs, output: output + nn.functional.linear(inputs[0], change.to(inputs[0].dtype)).to(output.dtype)

    handles = [lm.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dense(lm: nn.Module) -> dict[str, Tensor]:
    """What the adapter adds to each layer's weight [out, in], in float32: scaling x B A."""
    return {name: sum_of(module) for name, module in layers(lm).items()}


def sum_of(layer: Any) -> Tensor:
    """The change of one layer's weight over its active adapters."""
    parts = [layer.get_delta_weight(name).detach().float() for name in layer.active_adapters]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def merged(lm: PreTrainedModel) -> PreTrainedModel:
    """The same model with the adapter's change in its weights, by PEFT's own merge, and without adapter; in place."""
    for name, layer in layers(lm).items():
        layer.merge(safe_merge=True)
        place, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(place), attribute, layer.get_base_layer())
    lm._hf_peft_config_loaded = False  # so that transformers saves weights, and not an adapter
    del lm.peft_config
    return lm.requires_grad_(True).eval()
