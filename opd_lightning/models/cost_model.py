"""A cost model: the seconds of a step by part, predicted from shapes, lengths and rates of the machine.

    rollout   prompts' FLOPs / forward, and for each of the longest completion's tokens: the layers' bytes / decode and the
              output layer's bytes / reading, or the rows' FLOPs / forward if that is longer
    score     the teachers' FLOPs / forward
    update    the layers' FLOPs / forward and / backward, the output layers' / logits, the optimizer's numbers / reading

A roofline (Williams et al. 2009) whose rates are those of a layer of the student's widths, so that attention, norms and the
calls of a layer are in them.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from opd_lightning.models.cpu import fast_on_cpu
from opd_lightning.models.flops import Sizes
from opd_lightning.models.packed import packed, packed_product
from opd_lightning.utils.products import product, suits

ROWS, LENGTH = 4, 128
"""Texts, and tokens of each, of the readings that are timed."""
FEW, LARGE = 8, 4096
"""Rows of the timed products of decoding, and width of one that is larger than a processor's caches."""
WIDEST, VOCABULARY = 2048, 2**15
"""Width and vocabulary from which on a smaller model has the same rates."""
LAYERS = 2
"""Layers of the model that is timed."""
NUMBERS = 7
"""Numbers that AdamW reads and writes for each trained weight."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, for a model's shape.

    Attributes:
        forward: FLOPs of layers that read texts, without gradients.
        backward: FLOPs of their backward passes.
        logits: FLOPs of an output layer over many positions, with its softmax.
        decode: bytes of the layers' weights where they read one token of each row.
        reading: bytes of one large weight.
    """

    forward: float
    backward: float
    logits: float
    decode: float
    reading: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, config: Any) -> "Rates":
        """The rates of a device, in about a second for a model of 135M weights.

        Args:
            dtype: in which the model's products are computed.
            config: a transformers configuration, whose widths count.
        """
        lm = layers_of(config, device, dtype)
        with torch.autocast(device.type, enabled=False), fast_on_cpu(lm):
            forward, both = passes(lm, device)
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            decode, reading, logits = decoding(lm, device), large_product(device, dtype), output_layer(lm, config, device)
        weights = sum(p.numel() for p in lm.parameters() if p.dim() == 2) - lm.get_input_embeddings().weight.numel()  # type: ignore[operator]
        flops = 2 * weights * ROWS * LENGTH
        return cls(
            flops / forward, 2 * flops / max(both - forward, forward), logits, weights * dtype.itemsize / decode, reading
        )


def layers_of(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of a few layers with a model's widths, or of `WIDEST` if these are larger."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    scale = min(1.0, WIDEST / text.hidden_size)
    kept = max(round(heads * scale) // groups, 1)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    small = LlamaConfig(
        vocab_size=8,
        hidden_size=round(text.hidden_size * scale),
        intermediate_size=round(inner * scale),
        num_hidden_layers=LAYERS,
        num_attention_heads=kept * groups,
        num_key_value_heads=kept,
        head_dim=width + width % 2,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        return LlamaModel(small).to(device=device, dtype=dtype).eval()  # type: ignore[arg-type, call-arg]


def passes(lm: PreTrainedModel, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward pass without gradients, and of a forward and a backward pass."""
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device=device)

    def forward() -> None:
        with torch.no_grad():
            lm(ids, use_cache=False)

    def both() -> None:
        lm(ids, use_cache=False).last_hidden_state.sum().backward()

    return usual(forward, device), usual(both, device)


def decoding(lm: PreTrainedModel, device: torch.device) -> float:
    """Seconds of the layers for one more token of a few rows."""
    token = torch.zeros(FEW, 1, dtype=torch.long, device=device)
    with packed(lm), fast_on_cpu(lm):
        cache = lm(token.expand(FEW, LENGTH // 2), use_cache=True).past_key_values
        return usual(lambda: lm(token, past_key_values=cache), device)


def large_product(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes of a large weight that a product of a few rows reads in a second."""
    layer = nn.Linear(LARGE, LARGE, bias=False, device="meta").to_empty(device=device).to(dtype).requires_grad_(False)
    few = torch.ones(FEW, LARGE, device=device, dtype=dtype)
    layer.weight.fill_(1.0)
    multiply = packed_product(layer) or layer.forward
    return LARGE**2 * dtype.itemsize / usual(lambda: multiply(few), device)


def output_layer(lm: PreTrainedModel, config: Any, device: torch.device) -> float:
    """FLOPs in a second of an output layer's product and its softmax in float32."""
    hidden, vocabulary = lm.config.hidden_size, min(config.get_text_config().vocab_size, VOCABULARY)
    weight = torch.ones(vocabulary, hidden, dtype=lm.dtype, device=device)
    rows = torch.ones(LENGTH, hidden, dtype=lm.dtype, device=device)
    multiply: Callable[[Tensor, Tensor], Tensor] = product if suits(weight) else nn.functional.linear
    seconds = usual(lambda: multiply(rows, weight).float().log_softmax(-1), device)
    return 2 * LENGTH * hidden * vocabulary / seconds


def usual(step: Callable[[], Any], device: torch.device, rounds: int = 3) -> float:
    """The median seconds of a step."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return max(statistics.median(times[1:]), 1e-9)


@dataclass(frozen=True)
class Work:
    """The work of a step on one device.

    Attributes:
        flops: by part: "rollout", "teacher", "forward" and "backward", as `models.flops` counts them.
        decoded: tokens that are decoded one after another, the longest completion's.
        positions: of which the student has logits in the loss.
        teacher_logits: FLOPs among the teachers' that are spent in the loss.
    """

    flops: Mapping[str, float]
    decoded: int = 0
    positions: int = 0
    teacher_logits: float = 0.0


@dataclass(frozen=True)
class Model:
    """What determines a student's speed.

    Attributes:
        sizes: of its matrices.
        trained: trained weights.
        width: bytes of a weight in decoding.
    """

    sizes: Sizes
    trained: int
    width: int

    @classmethod
    def of(cls, lm: PreTrainedModel, sizes: Sizes, dtype: torch.dtype) -> "Model":
        """That of a language model, decoded in a dtype."""
        return cls(sizes, sum(p.numel() for p in lm.parameters() if p.requires_grad), dtype.itemsize)


def predicted(work: Work, rates: Rates, model: Model) -> dict[str, float]:
    """Seconds of "rollout", "score" and "update"; none for a rollout that the student does not write."""
    sizes, flops = model.sizes, work.flops
    step = model.width * (sizes.layers / rates.decode + sizes.head / rates.reading)
    rollout = max(work.decoded * step, flops.get("rollout", 0.0) / rates.forward)
    forward, backward, head = flops.get("forward", 0.0), flops.get("backward", 0.0), sizes.logits(work.positions)
    layers = max(forward - head, 0.0) / rates.forward + max(backward - 2 * head, 0.0) / rates.backward
    logits = (3 * head if forward else 0.0) + work.teacher_logits
    optimizer = NUMBERS * 4 * model.trained / rates.reading if backward else 0.0
    return {
        "rollout": rollout if work.decoded else 0.0,
        "score": max(flops.get("teacher", 0.0) - work.teacher_logits, 0.0) / rates.forward,
        "update": layers + logits / rates.logits + optimizer,
    }


def off(predicted: Mapping[str, float], measured: Mapping[str, float], factor: float = 1.5) -> dict[str, float]:
    """Measured over predicted seconds of the parts that take a tenth of the time and differ by more than a factor."""
    least = 0.1 * sum(measured.values())
    ratios = {part: measured[part] / s for part, s in predicted.items() if s > 0 and measured.get(part, 0.0) > least}
    return {part: ratio for part, ratio in ratios.items() if not 1 / factor <= ratio <= factor}
