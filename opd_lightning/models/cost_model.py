"""A cost model: the seconds of a step by part, predicted from shapes, lengths and rates of the machine.

    rollout   prompts' FLOPs / products, and for each of the longest completion's tokens: the weights' bytes / reading, or the
              rows' FLOPs / products if that is longer, and the layers' calls
    score     the teachers' FLOPs / products, and the layers' calls
    update    forward and backward FLOPs / products, the layers' calls, and the optimizer's numbers / reading

A roofline (Williams et al. 2009) of three rates. Left out are attention's softmax, norms, the loss and everything on the host.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from opd_lightning.models.flops import Sizes
from opd_lightning.models.packed import packed_product
from opd_lightning.utils.products import product, suits

ROWS, WIDTH = 512, 1024
"""Rows, and width of a square weight, of the product that is measured for readings."""
FEW, LARGE = 8, 4096
"""Those of the product that is measured for decoding; its weight is larger than a processor's caches."""
LAYERS = 4
"""Layers of the tiny model whose forward pass is timed."""
NUMBERS = 7
"""Numbers that AdamW reads and writes for each trained weight."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        products: FLOPs in products of many rows.
        reading: bytes of weights in products of few rows.
        layer: seconds of a small layer's forward pass on one token, which is the time of its calls.
    """

    products: float
    reading: float
    layer: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Rates":
        """The rates of a device, in about a fifth of a second.

        Args:
            dtype: in which the model's products are computed.
        """
        layer = nn.Linear(LARGE, LARGE, bias=False, device="meta").to_empty(device=device).to(dtype).requires_grad_(False)
        layer.weight.fill_(1.0)
        few, many = (torch.ones(rows, width, device=device, dtype=dtype) for rows, width in ((FEW, LARGE), (ROWS, WIDTH)))
        weight, tiny = layer.weight[:WIDTH, :WIDTH].contiguous(), small_model(device, dtype)
        ids = torch.zeros(FEW, 1, dtype=torch.long, device=device)
        multiply = product if suits(weight) else nn.functional.linear
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            decode = packed_product(layer) or layer.forward
            steps = (lambda: multiply(many, weight), lambda: decode(few), lambda: tiny(ids, use_cache=False))
            seconds = [usual(step, device) for step in steps]
        return cls(2 * ROWS * WIDTH**2 / seconds[0], LARGE**2 * dtype.itemsize / seconds[1], seconds[2] / LAYERS)


def small_model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of a few layers, whose products take no time."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, pad_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        return LlamaModel(config).to(device=device, dtype=dtype).eval()  # type: ignore[arg-type, call-arg]


def usual(step: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
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
        readings: forward passes of teachers.
        passes: forward and backward passes of the student.
    """

    flops: Mapping[str, float]
    decoded: int = 0
    readings: int = 1
    passes: int = 1


@dataclass(frozen=True)
class Model:
    """What determines a student's speed.

    Attributes:
        sizes: of its matrices.
        layers: the number of them.
        trained: trained weights.
        width: bytes of a weight in decoding.
    """

    sizes: Sizes
    layers: int
    trained: int
    width: int

    @classmethod
    def of(cls, lm: PreTrainedModel, sizes: Sizes, dtype: torch.dtype) -> "Model":
        """That of a language model, decoded in a dtype."""
        trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        return cls(sizes, int(getattr(lm.config.get_text_config(), "num_hidden_layers", None) or 1), trained, dtype.itemsize)


def predicted(work: Work, rates: Rates, model: Model) -> dict[str, float]:
    """Seconds of "rollout", "score" and "update"; none for a rollout that the student does not write."""
    calls, flops = model.layers * rates.layer, work.flops
    weights = (model.sizes.layers + model.sizes.head) * model.width / rates.reading
    decoding = max(work.decoded * weights, flops.get("rollout", 0.0) / rates.products)
    updates = flops.get("forward", 0.0) + flops.get("backward", 0.0)
    optimizer = NUMBERS * 4 * model.trained / rates.reading
    return {
        "rollout": decoding + (work.decoded + 1) * calls if work.decoded else 0.0,
        "score": flops.get("teacher", 0.0) / rates.products + work.readings * calls,
        "update": updates / rates.products + 3 * work.passes * calls + optimizer,
    }


def off(predicted: Mapping[str, float], measured: Mapping[str, float], factor: float = 1.5) -> dict[str, float]:
    """Measured over predicted seconds of the parts that take a tenth of the time and differ by more than a factor."""
    least = 0.1 * sum(measured.values())
    ratios = {part: measured[part] / s for part, s in predicted.items() if s > 0 and measured.get(part, 0.0) > least}
    return {part: ratio for part, ratio in ratios.items() if not 1 / factor <= ratio <= factor}
