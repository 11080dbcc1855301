"""Floating-point operations of a training step, from a model's sizes and the lengths of prompts and completions.

Counted is what the matrix products of a dense transformer need, a multiplication and its addition being two operations: "model
FLOPs" as in PaLM (arXiv 2204.02311, appendix B), which a smaller micro-batch, recomputed activations or padding do not change.
With W weights in the layers' matrices, A = layers x heads x head width, and V x H weights in the output layer:

    reading a sequence of L tokens      2 W L + 4 A L^2        (attention without the saving that causality allows)
    logits of N positions               2 V H N
    writing T tokens behind a prompt of P, with a cache: reading P, then one token at a time behind t = P+1 .. P+T-1 others,
                                        2 W (P + T - 1) + 4 A (P^2 + sum t), and the logits of T positions
    backward of a reading               as much again for the activations, and for those weights that are trained

Left out: embeddings, norms, softmax, the loss and the optimizer. Of a mixture's experts those count that are active on a token;
where the configuration has no such number, all count, with a warning. Layers without attention (Mamba, RWKV) have A = 0; their
states are left out. Where the embedding is frozen, as with an adapter, the first layer's input
gradient is counted though it is not computed: about 5 % of the backward pass of a model of three layers, less in deeper ones.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from opd_lightning.models.backbone import backbone
from opd_lightning.models.quantized import plain_shape
from opd_lightning.types import Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine a model's FLOPs.

    Attributes:
        layers: weights in the matrices of the layers.
        attention: layers x heads x head width.
        head: weights of the output layer.
        trained: those of `layers` that are trained.
        trained_head: those of `head` that are trained.
    """

    layers: int
    attention: int
    head: int
    trained: int
    trained_head: int

    @classmethod
    def of(cls, lm: PreTrainedModel) -> "Sizes":
        """The sizes of a transformers model."""
        config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
        weights, share = matrices(lm), expert_shares(backbone(lm), config)
        return cls(
            layers=round(sum(plain_shape(p).numel() * share.get(id(p), 1.0) for p in weights)),
            attention=attention(config),
            head=head.numel(),
            trained=round(sum(p.numel() * share.get(id(p), 1.0) for p in weights if p.requires_grad)),
            trained_head=head.numel() if head.requires_grad else 0,
        )

    def times(self, n: int) -> "Sizes":
        """The sizes of n such models on the same input."""
        return replace(self, layers=n * self.layers, attention=n * self.attention, head=n * self.head)

    def read(self, lengths: Iterable[int]) -> int:
        """FLOPs of a forward pass over sequences of these lengths, without logits."""
        return sum(2 * self.layers * n + 4 * self.attention * n**2 for n in lengths)

    def logits(self, positions: int) -> int:
        """FLOPs of the logits of `positions` positions."""
        return 2 * self.head * positions

    def write(self, pairs: Iterable[tuple[int, int]]) -> int:
        """FLOPs of decoding with a cache; a pair is the tokens of a prompt and of its completion."""
        total = 0
        for prompt, completion in pairs:
            keys = sum(range(prompt + 1, prompt + completion))
            total += self.read([prompt]) + 2 * self.layers * (completion - 1) + 4 * self.attention * keys
            total += self.logits(completion)
        return total

    def backward(self, lengths: Iterable[int], positions: int) -> int:
        """FLOPs of the gradients of `read` and `logits`."""
        layers = sum(2 * (self.layers + self.trained) * n + 8 * self.attention * n**2 for n in lengths)
        return layers + 2 * (self.head + self.trained_head) * positions


def matrices(lm: PreTrainedModel) -> list[nn.Parameter]:
    """The weights in the layers' matrices: all but tables of embeddings, the output layer, norms and biases."""
    tables = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables.add(id(lm.get_output_embeddings().weight))
    return [p for p in backbone(lm).parameters() if p.dim() >= 2 and id(p) not in tables]


def attention(config: Any) -> int:
    """Layers x heads x head width; 0 without attention, or, with a warning, where the configuration lacks a size."""
    try:
        heads = getattr(config, "num_attention_heads", None) or 0
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        return int(config.num_hidden_layers * heads * width)
    except Exception as error:  # such as layers that differ; a count must not stop a run
        log.warning(f"warning: FLOPs are counted without attention's products: {type(config).__name__} lacks a size ({error}).")
        return 0


def expert_shares(module: nn.Module, config: Any) -> dict[int, float]:
    """The share of each expert weight, by parameter id, that is active on one token."""
    total = first_of(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = first_of(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
    experts = {id(p) for name, p in module.named_parameters() if re.search(r"(^|\.)experts\.", name)}
    if experts and not (total and active):
        log.warning(f"warning: {type(config).__name__} has no number of experts per token; FLOPs are counted as if all did.")
        return {}
    return dict.fromkeys(experts, active / total) if experts else {}


def first_of(config: Any, *names: str) -> int:
    """The first non-zero integer among a configuration's attributes, else 0."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), 0)


def rollout_flops(student: Sizes, samples: Sequence[Sample]) -> int:
    """FLOPs of the student's generation of its samples."""
    return student.write(
        [(sample.prompt_length, len(sample.completion_ids)) for sample in samples if sample.source == "student"]
    )


def update_flops(student: Sizes, samples: Sequence[Sample]) -> dict[str, int]:
    """FLOPs of one update on these samples: the student's forward and backward pass."""
    lengths, positions = [len(sample.token_ids) for sample in samples], sum(sample.trainable for sample in samples)
    return {
        "forward": student.read(lengths) + student.logits(positions),
        "backward": student.backward(lengths, positions),
    }
