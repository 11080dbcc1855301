"""Activations from shapes alone: what a forward pass keeps for the backward pass, counted on tensors without data."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PretrainedConfig

from opd_lightning.models import Pretrained, adapters
from opd_lightning.models.architecture import class_of
from opd_lightning.models.backbone import backbone
from opd_lightning.models.flops import matrices

TOKENS = 256
"""Tokens of the pass from which the share of one is taken."""


class Shapes:
    """A model with its adapter on tensors without data.

    Args:
        model: whose configuration it has.
        adapter: a PEFT configuration, or None.

    Attributes:
        trained: numbers that are trained.
        all: numbers in all, without the adapter's.
        added: numbers of the adapter.
        linear: numbers in the frozen linear layers, which `adapter=qlora` stores in 4 bits.
        head: numbers of the output layer.
        tied: whether it is the embedding.
        layers: numbers in the layers' matrices.
    """

    def __init__(self, model: Pretrained, adapter: Any, autocast: torch.dtype | None):
        config = model.config()
        plain = adapter.plain() if hasattr(adapter, "quantization") else adapter
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention(model))
            self.layers = sum(p.numel() for p in matrices(lm))
            if plain is not None:
                adapters.add(lm, plain)
        head, table = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
        named = list(lm.named_parameters())
        self.added = sum(p.numel() for name, p in named if ".lora_" in name)
        self.all = sum(p.numel() for _, p in named) - self.added
        self.trained = sum(p.numel() for _, p in named if p.requires_grad)
        self.linear = sum(p.numel() for name, p in named if ".base_layer." in name and p.ndim == 2)
        self.head, self.tied = head.numel(), head is table
        self.config, self.checkpointing, self.autocast, self.lm = config, model.checkpointing, autocast, lm

    @property
    def token(self) -> float:
        """Bytes that a forward pass keeps of each token."""
        return self.kept[0]

    @property
    def layer(self) -> float:
        """Bytes of one token that a layer's forward pass keeps at most, with checkpointing: it is computed anew."""
        return self.kept[1]

    @property
    def pass_of_token(self) -> float:
        """Bytes that an update takes for each token of a forward pass."""
        return self.token + (self.layer if self.checkpointing else 0)

    @cached_property
    def kept(self) -> tuple[float, float]:
        """The bytes of a token in all layers, and in one; counted when they are asked for."""
        try:
            with FakeTensorMode():
                without_data(self.lm)
                return self.counted(self.lm.train())
        except Exception:  # of a layer that asks for values, as some of Mamba do
            layer = usual_bytes(self.config, False) / self.config.num_hidden_layers
            return float(usual_bytes(self.config, self.checkpointing)), layer

    def counted(self, lm: Any) -> tuple[float, float]:
        """The bytes of a token in all layers, and in one."""
        token = per_token(lm, self.autocast)
        layer = token / lm.config.get_text_config().num_hidden_layers
        if self.checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            token = per_token(lm, self.autocast)
        return token, layer


def without_weights(model: Pretrained) -> Any:
    """A model of transformers that has shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config())


def product_dtype(model: Pretrained, precision: Any) -> torch.dtype:
    """The dtype of a model's products under the Trainer's precision."""
    return torch.bfloat16 if str(precision).startswith("bf16") else model.dtype


def without_data(lm: nn.Module) -> None:
    """Tensors of a CPU in place of those of the meta device, for which operators keep other tensors."""
    made: dict[int, Tensor] = {}
    for module in lm.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            module._parameters[name] = None if p is None else made[id(p)]  # type: ignore[assignment]
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype)


def attention(model: Pretrained) -> str:
    """The attention whose memory is counted; flash attention keeps what sdpa keeps."""
    has_sdpa = class_of(model.config(), model.name)._supports_sdpa
    return "sdpa" if has_sdpa and model.attention != "eager" else "eager"


def per_token(lm: Any, autocast: torch.dtype | None) -> float:
    """The bytes that a forward pass of the backbone keeps of each token, each storage once, without parameters."""
    seen: dict[int, Any] = {}
    own = {p.untyped_storage()._cdata for p in lm.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage())._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    back: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with saved_tensors_hooks(note, back), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        backbone(lm)(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in seen.values()) / TOKENS


def usual_bytes(config: PretrainedConfig, checkpointing: bool) -> int:
    """The bytes that a forward pass keeps for each token, by a usual layer's sizes.

    Counted are 16 hidden-sized float32 values per layer and the feed-forward's width twice (with checkpointing 2 and none).
    """
    widths = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    ffn_width = int(max(widths) if isinstance(widths, list | tuple) else widths)  # Gemma 3n has one per layer
    per_layer = 2 * config.hidden_size if checkpointing else 16 * config.hidden_size + 2 * ffn_width
    return 4 * config.num_hidden_layers * per_layer


def cache_bytes(config: PretrainedConfig, width: int) -> int:
    """The bytes of keys and values of one token."""
    heads = getattr(config, "num_attention_heads", None) or 0  # Mamba and RWKV keep a state of fixed size instead
    head_width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    kv_heads = (getattr(config, "num_key_value_heads", None) or heads) if heads else 0
    return int(2 * config.num_hidden_layers * kv_heads * head_width * width)


def state_bytes(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], size: int = 2**14) -> float:
    """The bytes of an optimizer's state for each trained number, by a step on a few of them."""
    weight = nn.Parameter(torch.zeros(size // 128, 128))
    optimizer, weight.grad = build([weight]), torch.zeros(size // 128, 128)
    optimizer.step()
    return sum(v.nbytes for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.numel() > 1) / size
