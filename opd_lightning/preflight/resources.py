"""What a run would need of its machine: memory, and room on the disk."""

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
from opd_lightning.preflight.checks import Finding, lengths
from opd_lightning.preflight.components import Components
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.weights import Parameters

GIB = 2**30


def blank(model: Pretrained) -> tuple[int, int, PretrainedConfig]:
    """Weights in the layers' matrices, parameters and configuration of a model whose weights are not loaded."""
    config = model.config()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in matrices(empty)), sum(p.numel() for p in empty.parameters()), config


def student(parts: Components, cfg: DictConfig) -> tuple[Parameters, PretrainedConfig]:
    """The student's weights, and those of them that train."""
    layers, parameters, config = blank(parts.model)
    width, adapted = torch.finfo(parts.model.dtype).bits // 8, cfg.adapter is not None
    # A low-rank adapter has two thin factors for each matrix; matrices are taken as square.
    thin = int(2 * cfg.adapter.get("r", 8) * (layers * 7 * config.num_hidden_layers) ** 0.5) if adapted else parameters
    return Parameters(parameters, layers, thin, width, adapted), config


def device(cfg: DictConfig) -> tuple[str, int]:
    """What the student trains on, and the bytes that it has."""
    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        return "GPU", torch.cuda.get_device_properties(0).total_memory
    return "machine", int(psutil.virtual_memory().total)


def estimated(name: str, of: Callable[[Components, DictConfig], Iterator[Finding]]) -> Callable[..., Iterator[Finding]]:
    """An estimate that says so where a model's configuration lacks what it needs, and stops nothing."""

    @wraps(of)
    def tried(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
        try:
            yield from list(of(parts, cfg))
        except (ValueError, OSError):  # these name a field
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            yield Finding(name, "warn", f"not estimated for {parts.model.path} ({reason})")

    return tried


def memory(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
    """What a run takes of one device, roughly, against what it has; see `memory_of`."""
    return estimated("memory", memory_of)(parts, cfg)


def disk(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
    """Room for checkpoints; see `disk_of`."""
    return estimated("disk", disk_of)(parts, cfg)


def memory_of(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
    """Parameters, optimizer, teachers, activations and rollout cache of one device, roughly, against what it has."""
    weights, config = student(parts, cfg)
    width, devices = torch.finfo(parts.model.dtype).bits // 8, cfg.trainer.devices
    spread = devices if "ModelParallel" in str(cfg.trainer.strategy) and isinstance(devices, int) else 1
    sizes = {"weights": weights.all * width / spread, "gradients and AdamW": weights.trained * (width + 8) / spread}
    name, room = device(cfg)
    if (least := sum(sizes.values())) > room:
        text = f"weights, gradients and AdamW alone take {least / GIB:.2g} GiB of the {name}'s {room / GIB:.2g}"
        yield Finding("memory", "fail", f"{text}; choose a smaller model, adapter=lora, or trainer=fsdp2 with more devices.")
        return
    for part_name, part in all_parts(parts.teachers):
        source = part.source
        other = 0 if source is None else blank(source)[1] * torch.finfo(source.dtype).bits // 8
        sizes[part_name] = other + part.footprint(weights)
    sizes |= passing(parts, cfg, config, width)
    total = sum(sizes.values())
    told = ", ".join(f"{part} {size / GIB:.2g}" for part, size in sizes.items() if size)
    state = "pass" if total < 0.7 * room else "warn"
    remedy = (
        ""
        if state == "pass"
        else "; lower max_tokens_per_microbatch or data.batch_size, or try model.checkpointing=true, adapter=lora"
    )
    yield Finding("memory", state, f"about {total / GIB:.2g} GiB ({told}) of the {name}'s {room / GIB:.3g}{remedy}")


def passing(parts: Components, cfg: DictConfig, config: PretrainedConfig, width: int) -> dict[str, float]:
    """Bytes that come and go within a step.

    Activations are counted as 16 hidden-sized values per token and layer and the feed-forward's width twice (with checkpointing
    2 and none); the head holds `chunk` rows of logits a few times over.
    """
    longest = max(lengths(list(parts.examples), parts, NoContext(parts.model.template_options)), default=0)
    length, light = longest + parts.rollout.sampling.max_new_tokens, parts.model.checkpointing
    rows = cfg.data.batch_size * parts.rollout.sampling.n
    tokens = min(rows * length, max(cfg.max_tokens_per_microbatch or rows * length, length))
    given = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = int(max(given) if isinstance(given, list | tuple) else given)  # Gemma 3n has one for each layer
    values = 2 * config.hidden_size if light else 16 * config.hidden_size + 2 * wide
    heads = getattr(config, "num_attention_heads", None) or 0  # Mamba and RWKV keep a state of fixed size instead
    head = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    keys = (getattr(config, "num_key_value_heads", None) or heads) if heads else 0
    cached = 2 * rows * length * config.num_hidden_layers * keys * head * width
    return {
        "activations": tokens * config.num_hidden_layers * values * 4,
        "logits": 4 * cfg.logits_chunk_size * config.vocab_size * 4,
        "rollout cache": cached if parts.rollout.student_writes else 0,
    }


def disk_of(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
    """Room for two checkpoints, for one is written beside the last, and only then takes its place."""
    weights, _ = student(parts, cfg)
    width = torch.finfo(parts.model.dtype).bits // 8
    need = 2 * weights.trained * 3 * width  # AdamW keeps two more values of a weight's own type
    place = Path(str(cfg.output_dir)).absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"two checkpoints take about {need / GIB:.2g} GiB of {free / GIB:.3g} free at {place}"
    state = "pass" if need < free else "warn"
    yield Finding("disk", state, text if state == "pass" else f"{text}; make room, or choose another output_dir.")
