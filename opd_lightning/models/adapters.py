"""Adapters by PEFT: small weights beside frozen ones, put into the model in place, so that it stays the class it is."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def add(lm: PreTrainedModel, adapter) -> PreTrainedModel:
    """Put a fresh adapter into a model, in place; only it is trained, in float32.

    Args:
        adapter: a PEFT configuration, such as `peft.LoraConfig`.

    Raises:
        ValueError: PEFT cannot apply it, it adapts the output layer, whose weights the loss reads without it, or it trains or
            changes other weights than low-rank factors, which neither checkpoint nor export would have; or a layer is not what
            PEFT takes it for.
    """
    init = getattr(adapter, "init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"adapter.init_lora_weights={init!r} changes the frozen weights too, which a checkpoint does not hold; choose "
            "true or gaussian."
        )
    try:
        lm.add_adapter(sparing(lm, adapter))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"adapter: PEFT cannot put it into {type(lm).__name__} ({error}).") from error
    if type(lm.get_output_embeddings()) is not nn.Linear:
        raise ValueError(
            f"adapter.target_modules={adapter.target_modules} adapts the output layer, which the loss applies by itself; leave "
            "it out (all-linear does)."
        )
    check_layers(lm, adapter)
    if not is_low_rank(lm):
        raise ValueError(
            "adapter trains more than low-rank factors; leave out modules_to_save and bias, or choose adapter=none."
        )
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return lm


def is_own(module: nn.Module) -> bool:
    """Is this a linear layer by its class alone, as a router that returns a tuple? Found by reading zeros and ones."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is nn.Linear or not kind.__module__.startswith("transformers.models."):
        return False
    inputs = torch.eye(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    try:
        with torch.no_grad():
            return not torch.allclose(module(inputs), nn.functional.linear(inputs, module.weight, module.bias))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return True


SEALED = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Architectures whose kernels read out_proj's weights past the layer, so that PEFT refuses to adapt it; Mamba's dt_proj is read
like that in all of them, and its adapter would learn nothing."""


def sparing(lm: PreTrainedModel, adapter: Any) -> Any:
    """The configuration, which leaves out what `all-linear` takes for linear layers to adapt and cannot."""
    sealed = (".dt_proj", ".out_proj") if lm.config.model_type in SEALED else (".dt_proj",)
    names = [name for name, module in lm.named_modules() if name.endswith(sealed) or is_own(module)]
    given = getattr(adapter, "exclude_modules", None)
    if not names or getattr(adapter, "target_modules", None) != "all-linear":
        return adapter
    spared = copy.copy(adapter)
    pattern = "|".join(map(re.escape, names))
    spared.exclude_modules = f"(?:{given})|{pattern}" if isinstance(given, str) else [*(given or []), *names]
    return spared


def check_layers(lm: nn.Module, adapter: Any) -> None:
    """Make sure that each adapted layer adds scaling x B A to its weights, and nothing else.

    Raises:
        ValueError: one does not; its average, and the merged model, would be other than what was trained.
    """
    for name, layer in layers(lm).items():
        if is_own(layer.get_base_layer()):
            raise ValueError(
                f"adapter.target_modules={adapter.target_modules} adapts {name}, a {type(layer.get_base_layer()).__name__}, "
                "whose output is no plain product; leave it out (all-linear does)."
            )
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ValueError(
                f"adapter.target_modules={adapter.target_modules} adapts {name}, a convolution of groups, which PEFT cannot "
                "merge; leave it out (all-linear does)."
            )
        if layer.lora_variant or any(getattr(layer, "lora_bias", {}).values()):
            raise ValueError(
                "adapter asks for a variant of LoRA (use_dora, lora_bias or the like), whose effect is more than a low-rank "
                "change of weights; leave it out."
            )


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
    """The model with changes of its layers' weights, by the names and in the shapes of `dense`.

    A linear layer adds x @ change.T to what it returns, which no rounding swallows; other layers get other weights, rounded to
    their type.
    """
    found = layers(lm)
    linear = [name for name in changes if is_linear(found[name])]
    names = {id(p): name for name, p in lm.named_parameters()}
    others = {id(w): (w, changes[name]) for name in changes if name not in linear for w in [weight_of(found[name])]}

    def hook(change: Tensor):
        return lambda _, inputs, output: output + nn.functional.linear(inputs[0], change.to(inputs[0].dtype)).to(output.dtype)

    handles = [found[name].register_forward_hook(hook(changes[name])) for name in linear]
    try:
        with substituted(lm, {names[key]: weight.detach().float() + change for key, (weight, change) in others.items()}):
            yield
    finally:
        for handle in handles:
            handle.remove()


def is_linear(layer: Any) -> bool:
    """Does this adapted layer multiply its input by one matrix? Experts in one parameter and convolutions do not."""
    return isinstance(layer.get_base_layer(), nn.Linear | Conv1D) and not hasattr(layer, "parameter_name")


def weight_of(layer: Any) -> Tensor:
    """The weight that a layer adapts."""
    return layer.get_base_layer().get_parameter(getattr(layer, "parameter_name", "weight"))


def dense(lm: nn.Module) -> dict[str, Tensor]:
    """What the adapter adds to each layer's weight, in float32: scaling x B A, [out, in] of linear layers."""
    return {name: sum_of(module) for name, module in layers(lm).items()}


def sum_of(layer: Any) -> Tensor:
    """The change of one layer's weight over its active adapters."""
    parts = [layer.get_delta_weight(name).detach().float() for name in layer.active_adapters]
    total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return total.T if getattr(layer, "fan_in_fan_out", False) else total  # GPT-2 keeps its weights as [in, out]


def merged(lm: PreTrainedModel) -> PreTrainedModel:
    """The same model with the adapter's change in its weights, by PEFT's own merge, and without adapter; in place."""
    found = layers(lm)
    for layer in found.values():
        layer.merge(safe_merge=True)
    for name, layer in found.items():
        if any(name.startswith(f"{other}.") for other in found):
            continue  # the adapters of two parameters of one module are nested, and the outer one knows the module
        place, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(place), attribute, layer.get_base_layer())
    lm._hf_peft_config_loaded = False  # so that transformers saves weights, and not an adapter
    del lm.peft_config
    return lm.requires_grad_(True).eval()
