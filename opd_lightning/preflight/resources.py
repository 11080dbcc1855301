"""Estimates of the memory and disk space of a run."""

import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, PretrainedConfig

from opd_lightning.models import Pretrained
from opd_lightning.models.flops import matrices
from opd_lightning.preflight.checks import CheckResult, lengths
from opd_lightning.preflight.components import Components
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.weights import Parameters

GIB = 2**30


def sizes_of(model: Pretrained) -> tuple[int, int, PretrainedConfig]:
    """The weights in the layers' matrices, all parameters, and the configuration of a model, without loading it."""
    config = model.config()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in matrices(lm)), sum(p.numel() for p in lm.parameters()), config


def student(parts: Components, cfg: DictConfig) -> tuple[Parameters, PretrainedConfig]:
    """The student's parameter counts, and its configuration."""
    layers, parameters, config = sizes_of(parts.model)
    width, adapted = torch.finfo(parts.model.dtype).bits // 8, cfg.adapter is not None
    # A low-rank adapter has two thin factors for each matrix; matrices are taken as square.
    trained = int(2 * cfg.adapter.get("r", 8) * (layers * 7 * config.num_hidden_layers) ** 0.5) if adapted else parameters
    return Parameters(parameters, layers, trained, width, adapted), config


def device(cfg: DictConfig) -> tuple[str, int]:
    """The training device's name, and its memory in bytes."""
    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        return "GPU", torch.cuda.get_device_properties(0).total_memory
    return "machine", int(psutil.virtual_memory().total)


def estimated(
    name: str, estimate: Callable[[Components, DictConfig], Iterator[CheckResult]]
) -> Callable[..., Iterator[CheckResult]]:
    """An estimate that yields a warning, not an error, where a model's configuration lacks what it needs."""

    @wraps(estimate)
    def guarded(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
        try:
            yield from list(estimate(parts, cfg))
        except (ValueError, OSError):  # these name a field
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            yield CheckResult(name, "warn", f"not estimated for {parts.model.path} ({reason})")

    return guarded


def memory(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on the estimated memory of one device; see `memory_of`."""
    return estimated("memory", memory_of)(parts, cfg)


def disk(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on the disk space for checkpoints; see `disk_of`."""
    return estimated("disk", disk_of)(parts, cfg)


def memory_of(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on the estimated memory of parameters, optimizer, teachers, activations and rollout cache on one device."""
    weights, config = student(parts, cfg)
    width, devices = torch.finfo(parts.model.dtype).bits // 8, cfg.trainer.devices
    shards = devices if "ModelParallel" in str(cfg.trainer.strategy) and isinstance(devices, int) else 1
    sizes = {"weights": weights.all * width / shards, "gradients and AdamW": weights.trained * (width + 8) / shards}
    name, capacity = device(cfg)
    if (minimum := sum(sizes.values())) > capacity:
        text = f"weights, gradients and AdamW alone take {minimum / GIB:.2g} GiB of the {name}'s {capacity / GIB:.2g}"
        yield CheckResult(
            "memory", "fail", f"{text}; choose a smaller model, adapter=lora, or trainer=fsdp2 with more devices."
        )
        return
    for part_name, part in all_parts(parts.teachers):
        source = part.source
        source_bytes = 0 if source is None else sizes_of(source)[1] * torch.finfo(source.dtype).bits // 8
        sizes[part_name] = source_bytes + part.footprint(weights)
    sizes |= transient_bytes(parts, cfg, config, width)
    total = sum(sizes.values())
    breakdown = ", ".join(f"{part} {size / GIB:.2g}" for part, size in sizes.items() if size)
    state = "pass" if total < 0.7 * capacity else "warn"
    remedy = (
        ""
        if state == "pass"
        else "; lower max_tokens_per_microbatch or data.batch_size, or try model.checkpointing=true, adapter=lora"
    )
    yield CheckResult(
        "memory", state, f"about {total / GIB:.2g} GiB ({breakdown}) of the {name}'s {capacity / GIB:.3g}{remedy}"
    )


def transient_bytes(parts: Components, cfg: DictConfig, config: PretrainedConfig, width: int) -> dict[str, float]:
    """The bytes of activations, logits and rollout cache, which are freed within a step.

    Activations are counted as 16 hidden-sized values per token and layer and the feed-forward's width twice (with checkpointing
    2 and none); the head holds `chunk` rows of logits a few times over.
    """
    longest = max(lengths(list(parts.examples), parts.renderer, NoContext(parts.model.template_options)), default=0)
    length, checkpointing = longest + parts.rollout.sampling.max_new_tokens, parts.model.checkpointing
    rows = cfg.data.batch_size * parts.rollout.sampling.n
    tokens = min(rows * length, max(cfg.max_tokens_per_microbatch or rows * length, length))
    widths = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    ffn_width = int(max(widths) if isinstance(widths, list | tuple) else widths)  # Gemma 3n has one per layer
    per_token = 2 * config.hidden_size if checkpointing else 16 * config.hidden_size + 2 * ffn_width
    heads = getattr(config, "num_attention_heads", None) or 0  # Mamba and RWKV keep a state of fixed size instead
    head_width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    kv_heads = (getattr(config, "num_key_value_heads", None) or heads) if heads else 0
    cached = 2 * rows * length * config.num_hidden_layers * kv_heads * head_width * width
    return {
        "activations": tokens * config.num_hidden_layers * per_token * 4,
        "logits": 4 * cfg.logits_chunk_size * config.vocab_size * 4,
        "rollout cache": cached if parts.rollout.student_writes else 0,
    }


def disk_of(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on disk space for two checkpoints: a new one is written before the last is removed."""
    weights, _ = student(parts, cfg)
    width = torch.finfo(parts.model.dtype).bits // 8
    need = 2 * weights.trained * 3 * width  # AdamW keeps two more values of a weight's own type
    folder = Path(str(cfg.output_dir)).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"two checkpoints take about {need / GIB:.2g} GiB of {free / GIB:.3g} free at {folder}"
    state = "pass" if need < free else "warn"
    yield CheckResult("disk", state, text if state == "pass" else f"{text}; make room, or choose another output_dir.")
