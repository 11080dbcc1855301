"""Adapters by PEFT: low-rank weights beside frozen ones, added to the model in place, so that its class is unchanged."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opd_lightning.models.quantized import is_quantized


def add(lm: PreTrainedModel, adapter) -> PreTrainedModel:
    """Add a fresh adapter to a model, in place; only the adapter is trained, in float32.

    Args:
        adapter: a PEFT configuration, such as `peft.LoraConfig`; a `QLoraConfig` stores the frozen layers in 4 bits.

    Raises:
        ValueError: PEFT cannot apply it; it adapts the output layer, whose weights the loss uses directly; it trains or changes
            other weights than low-rank factors, which neither checkpoint nor export would have; or it adapts a layer that is
            no plain linear layer.
    """
    init = getattr(adapter, "init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"adapter.init_lora_weights={init!r} changes the frozen weights too, which a checkpoint does not hold; choose "
            "true or gaussian."
        )
    if hasattr(adapter, "quantization"):
        from opd_lightning.models.quantization import quantize

        lm, adapter = quantize(lm, adapter), adapter.plain()
    try:
        lm.add_adapter(exclude_unfit(lm, adapter))
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


def is_custom_linear(module: nn.Module) -> bool:
    """Whether a subclass of Linear computes something else, such as a router's tuple; tested on unit vectors."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is nn.Linear or not kind.__module__.startswith("transformers.models."):
        return False
    inputs = torch.eye(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    try:
        with torch.no_grad():
            return not torch.allclose(module(inputs), nn.functional.linear(inputs, module.weight, module.bias))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return True


FUSED = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Architectures whose kernels use out_proj's weights without calling the layer, so that PEFT refuses to adapt it. All
kernels use Mamba's dt_proj in this way, and an adapter of it would have no effect."""


def exclude_unfit(lm: PreTrainedModel, adapter: Any) -> Any:
    """The adapter's configuration, which excludes layers that `all-linear` selects and that cannot be adapted."""
    fused = (".dt_proj", ".out_proj") if lm.config.model_type in FUSED else (".dt_proj",)
    names = [name for name, module in lm.named_modules() if name.endswith(fused) or is_custom_linear(module)]
    user_excluded = getattr(adapter, "exclude_modules", None)
    if not names or getattr(adapter, "target_modules", None) != "all-linear":
        return adapter
    adjusted = copy.copy(adapter)
    pattern = "|".join(map(re.escape, names))
    adjusted.exclude_modules = (
        f"(?:{user_excluded})|{pattern}" if isinstance(user_excluded, str) else [*(user_excluded or []), *names]
    )
    return adjusted


def check_layers(lm: nn.Module, adapter: Any) -> None:
    """Check that each adapted layer adds scaling x B A to its weights, and nothing else.

    Raises:
        ValueError: one does not; its average and the merged model would differ from the trained model.
    """
    for name, layer in layers(lm).items():
        if is_custom_linear(layer.get_base_layer()):
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
                "adapter sets a variant of LoRA (use_dora or lora_bias), whose effect is more than a low-rank "
                "change of weights; leave it out."
            )


def layers(lm: nn.Module) -> dict[str, Any]:
    """The layers with a low-rank adapter, by name."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}


def is_low_rank(lm: nn.Module) -> bool:
    """Whether there is an adapter, and only its low-rank factors are trained."""
    factors = {id(f) for layer in layers(lm).values() for part in (layer.lora_A, layer.lora_B) for f in part.parameters()}
    return bool(factors) and {id(p) for p in lm.parameters() if p.requires_grad} <= factors


def is_fresh(lm: nn.Module) -> bool:
    """Whether the adapter has no effect yet: every second factor is zero."""
    return is_low_rank(lm) and not any(torch.any(f) for layer in layers(lm).values() for f in layer.lora_B.parameters())


@contextmanager
def disabled(lm: PreTrainedModel) -> Iterator[None]:
    """A context in which the model's adapter is disabled."""
    lm.disable_adapters()
    try:
        yield
    finally:
        lm.enable_adapters()


@contextmanager
def substituted(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A context with other values for parameters, by name; the original values are restored exactly."""
    parameters = dict(module.named_parameters())
    original = {name: parameters[name].data for name in tensors}
    try:
        for name, value in tensors.items():
            parameters[name].data = value.to(original[name].dtype)
        torch.clear_autocast_cache()  # autocast may have kept a cast of the original values
        yield
    finally:
        for name, value in original.items():
            parameters[name].data = value
        torch.clear_autocast_cache()


@contextmanager
def added(lm: nn.Module, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """A context with changes added to the weights of layers, by the names and in the shapes of `dense`.

    A linear layer adds x @ change.T to its output, which avoids rounding of the sum; other layers get new weights, rounded to
    their dtype.
    """
    adapted = layers(lm)
    linear = [name for name in changes if is_linear(adapted[name])]
    names = {id(p): name for name, p in lm.named_parameters()}
    replaced = {id(w): (w, changes[name]) for name in changes if name not in linear for w in [weight_of(adapted[name])]}

    def hook(change: Tensor):
        return lambda _, inputs, output: output + nn.functional.linear(inputs[0], change.to(inputs[0].dtype)).to(output.dtype)

    handles = [adapted[name].register_forward_hook(hook(changes[name])) for name in linear]
    try:
        with substituted(lm, {names[key]: weight.detach().float() + change for key, (weight, change) in replaced.items()}):
            yield
    finally:
        for handle in handles:
            handle.remove()


def is_linear(layer: Any) -> bool:
    """Whether an adapted layer multiplies its input by one matrix; experts in one parameter and convolutions do not."""
    return isinstance(layer.get_base_layer(), nn.Linear | Conv1D) and not hasattr(layer, "parameter_name")


def weight_of(layer: Any) -> Tensor:
    """The weight that a layer adapts."""
    return layer.get_base_layer().get_parameter(getattr(layer, "parameter_name", "weight"))


def dense(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapter's change of each layer's weight by name, in float32: scaling x B A, [out, in] for linear layers."""
    yield from ((name, sum_of(module)) for name, module in layers(lm).items())


def sum_of(layer: Any) -> Tensor:
    """The change of one layer's weight, summed over its active adapters."""
    parts = [layer.get_delta_weight(name).detach().float() for name in layer.active_adapters]
    total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return total.T if getattr(layer, "fan_in_fan_out", False) else total  # GPT-2 keeps its weights as [in, out]


def merged(lm: PreTrainedModel) -> PreTrainedModel:
    """Merge the adapter into the model's weights by PEFT, and remove it; in place.

    Weights in 4 bits become ordinary ones, for the sum has more bits than they have.
    """
    from opd_lightning.models.quantization import dequantize, ordinary

    adapted = layers(lm)
    for layer in adapted.values():
        if not is_quantized(layer.get_base_layer()):
            layer.merge(safe_merge=True)
    for name, layer in adapted.items():
        if any(name.startswith(f"{other}.") for other in adapted):
            continue  # the adapters of two parameters of one module are nested, and the outer one has the module
        base = layer.get_base_layer()
        place, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(place), attribute, ordinary(base, sum_of(layer)) if is_quantized(base) else base)
    dequantize(lm)
    lm._hf_peft_config_loaded = False  # so that transformers saves weights, and not an adapter
    del lm.peft_config
    return lm.requires_grad_(True).eval()
