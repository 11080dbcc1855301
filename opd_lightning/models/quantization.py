"""Weights in 4 bits: the frozen linear layers of a model with an adapter (QLoRA, arXiv 2305.14314), by bitsandbytes.

The embedding and the output layer stay as they are, for the loss multiplies by the output layer's weights directly, and a tied
embedding is the same matrix.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opd_lightning.models.quantized import is_quantized, plain_weight

KINDS = ("nf4", "fp4")


@dataclass
class QLoraConfig(LoraConfig):
    """A low-rank adapter on weights in 4 bits; its other options are those of `peft.LoraConfig`.

    Args:
        quantization: nf4 (levels of a normal distribution) or fp4 (a floating-point number).
        double_quantization: whether the scales, one to 64 weights, are stored in 8 bits.
        compute_dtype: of the product with the weights, such as "bfloat16"; None takes that of the inputs.

    Raises:
        ValueError: the kind or the dtype is unknown, or bitsandbytes is not installed.
    """

    quantization: str = "nf4"
    double_quantization: bool = True
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization not in KINDS:
            raise ValueError(f"adapter.quantization={self.quantization} is unknown; choose nf4 or fp4.")
        if self.compute_dtype is not None and not isinstance(getattr(torch, self.compute_dtype, None), torch.dtype):
            raise ValueError(f"adapter.compute_dtype={self.compute_dtype!r} is no torch dtype; choose bfloat16 or float32.")
        if find_spec("bitsandbytes") is None:
            raise ValueError("adapter=qlora needs a package: pip install bitsandbytes (or opd-lightning[quantized]).")

    def plain(self) -> LoraConfig:
        """The adapter alone, as PEFT knows it and other programs read it."""
        own = ("quantization", "double_quantization", "compute_dtype")
        return LoraConfig(**{name: value for name, value in vars(self).items() if name in fields() and name not in own})


def fields() -> frozenset[str]:
    """The names of the options of PEFT's adapter."""
    return frozenset(LoraConfig.__dataclass_fields__) - {"peft_type", "peft_version", "runtime_config"}


def quantize(lm: PreTrainedModel, options: QLoraConfig) -> PreTrainedModel:
    """Store the linear layers of a model in 4 bits, one after the other, in place; those that are so already stay.

    Raises:
        ValueError: the model has no such layer.
    """
    names = [name for name, module in lm.named_modules() if type(module) in (nn.Linear, Conv1D) and fits(lm, module)]
    if not names and not any(is_quantized(module) for module in lm.modules()):
        raise ValueError(
            f"adapter.quantization={options.quantization}: {type(lm).__name__} has no plain linear layer; take adapter=lora."
        )
    for name in names:
        place, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(place), attribute, in_4_bits(lm.get_submodule(name), options))
    lm.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT chooses its layers by it
    return lm


def fits(lm: PreTrainedModel, module: Any) -> bool:
    """Whether a linear layer is not the output layer and shares its weight with no other module."""
    apart = {id(layer.weight) for layer in (lm.get_output_embeddings(), lm.get_input_embeddings()) if layer is not None}
    return id(module.weight) not in apart


def in_4_bits(layer: Any, options: QLoraConfig) -> nn.Module:
    """The layer with its weight in 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.detach()
    weight = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
    rows, columns = weight.shape
    dtype = None if options.compute_dtype is None else getattr(torch, options.compute_dtype)
    bias, squeeze, kind = layer.bias is not None, options.double_quantization, options.quantization
    made = Linear4bit(columns, rows, bias, dtype, squeeze, kind, device="meta")
    made.weight = Params4bit(weight, requires_grad=False, compress_statistics=squeeze, quant_type=kind, module=made)
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = (
        False  # it would lay the weights out for inference, in which layout they have no gradients
    )
    fast = "cuda" if torch.cuda.is_available() else weight.device  # a CPU takes a minute for a billion weights
    return made.to(fast).to(weight.device).requires_grad_(False).train(layer.training)


def dequantize(lm: PreTrainedModel) -> PreTrainedModel:
    """Ordinary layers in place of those in 4 bits, with the values that these stand for; in place."""
    for name, module in list(lm.named_modules()):
        if is_quantized(module):
            place, _, attribute = name.rpartition(".")
            setattr(lm.get_submodule(place), attribute, ordinary(module))
    lm.is_loaded_in_4bit = False  # type: ignore[assignment]
    return lm


def ordinary(layer: Any, change: Tensor | None = None) -> nn.Linear:
    """The linear layer that one in 4 bits stands for, with a change added to its weight."""
    weight = plain_weight(layer.weight)
    weight = weight if change is None else (weight.float() + change.to(weight.device)).to(weight.dtype)
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight, made.bias = nn.Parameter(weight), layer.bias
    return made.train(layer.training)
