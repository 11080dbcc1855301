"""Estimates of the memory and disk space of a run."""

import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from math import log2
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, ListConfig
from transformers import PretrainedConfig

from opd_lightning.config.trainer_arguments import processes_of
from opd_lightning.models import Pretrained
from opd_lightning.models.flops import matrices
from opd_lightning.preflight.activations import product_dtype, usual_bytes, without_weights
from opd_lightning.preflight.checks import CheckResult, lengths
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.memory_plan import Batch, Plan, models_of, plan, shapes_of
from opd_lightning.preflight.rendering import as_played
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.weights import Parameters

GIB = 2**30
SHARES = {"GPU": 0.5, "machine": 0.25}
"""The share of free memory that activations may take; a machine's is shared with other programs."""
LEAST, MOST = 256, 2**20
"""Bounds of the automatic number of tokens."""
ENOUGH = 6e10
"""FLOPs of a float32 forward pass from which a CPU is hardly faster with more tokens, which take memory; of 16 bits twice."""


def sizes_of(model: Pretrained) -> tuple[int, int, PretrainedConfig]:
    """The weights in the layers' matrices, all parameters, and the configuration of a model, without loading it."""
    lm = without_weights(model)
    return sum(p.numel() for p in matrices(lm)), sum(p.numel() for p in lm.parameters()), model.config()


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
    """Check results on the planned memory of one device in the phase that takes most, and on 1, 4 and 8 devices."""
    weights, _ = student(parts, cfg)
    sizes = own_bytes(parts, cfg, weights)
    name, capacity = device(cfg)
    if (minimum := sum(sizes.values())) > capacity:
        text = f"weights, gradients and AdamW alone take {minimum / GIB:.2g} GiB of the {name}'s {capacity / GIB:.2g}"
        yield CheckResult(
            "memory", "fail", f"{text}; choose a smaller model, adapter=lora, or trainer=fsdp2 with more devices."
        )
        return
    own, others = plans_of(parts, cfg)
    breakdown = ", ".join(f"{part} {size / GIB:.2g}" for part, size in own.parts.items())
    state = "pass" if own.peak < 0.7 * capacity else "warn"
    remedy = "" if state == "pass" else f"; {own.remedy(cfg)}"
    more = "; ".join(f"{words(other.devices, way)} {other.peak / GIB:.2g}" for way, other in others)
    text = f"about {own.peak / GIB:.2g} GiB in the {own.phase} ({breakdown}) of the {name}'s {capacity / GIB:.3g}"
    beside = "" if parts.environment is None else "; the environment's answers come on top"
    yield CheckResult("memory", state, f"{text}{beside}{remedy}. Each of: {more}")


def words(devices: int, way: str) -> str:
    """Devices and their strategy."""
    return "1 device" if devices == 1 else f"{devices} devices with {way}"


def own_bytes(parts: Components, cfg: DictConfig, weights: Parameters) -> dict[str, float]:
    """The bytes of the student's weights, gradients and optimizer on one device."""
    width = torch.finfo(parts.model.dtype).bits // 8
    shards = processes_of(cfg.trainer) or 1 if "ModelParallel" in str(cfg.trainer.strategy) else 1
    return {"weights": weights.all * width / shards, "gradients and AdamW": weights.trained * (width + 8) / shards}


def resident_bytes(parts: Components, cfg: DictConfig, weights: Parameters) -> dict[str, float]:
    """The bytes of `own_bytes`, of the teachers and of the environment's models."""
    sizes = own_bytes(parts, cfg, weights)
    for name, part in all_parts(parts.teachers):
        source = part.source
        source_bytes = 0 if source is None or part.shares_weights else sizes_of(source)[1] * torch.finfo(source.dtype).bits // 8
        sizes[name] = source_bytes + part.footprint(weights)
    for name, model in models_of(parts.environment).items():
        sizes[name] = sizes_of(model)[1] * torch.finfo(model.dtype).bits // 8
    return sizes


def plans_of(parts: Components, cfg: DictConfig) -> tuple[Plan, list[tuple[str, Plan]]]:
    """The plan of the run's memory, and what it would be on 1, 4 and 8 devices, by the strategy."""
    shapes, (rows, length) = shapes_of(parts, cfg), batch_shape(parts, cfg)
    most = automatic_tokens(parts, cfg)[0] if cfg.max_tokens_per_microbatch == "auto" else cfg.max_tokens_per_microbatch
    batch = Batch(rows, length, parts.rollout.sampling.max_new_tokens, most)
    local = [(name, part.source) for name, part in all_parts(parts.teachers) if part.source and not part.shares_weights]
    sources = {name: sizes_of(source)[1] for name, source in [*local, *models_of(parts.environment).items()]}
    sharded, devices = "ModelParallel" in str(cfg.trainer.strategy), cfg.trainer.devices

    def made(n: int, spread: bool) -> Plan:
        return plan(parts, cfg, shapes, sources, batch, n, spread)

    ways = [("trainer=ddp", False), ("trainer=fsdp2", True)]
    others = [(way, made(n, spread)) for n in (4, 8) for way, spread in ways]
    return made(devices if isinstance(devices, int) and devices > 0 else 1, sharded), [("", made(1, False)), *others]


def batch_shape(parts: Components, cfg: DictConfig) -> tuple[int, int]:
    """The samples of a rollout, and the longest of them in tokens; what environments will answer is not known."""
    shown = as_played(parts.examples[:512], parts.environment)
    longest = max(lengths(shown, parts.renderer, NoContext(parts.model.template_options)), default=0)
    return cfg.data.batch_size * parts.rollout.sampling.n, longest + parts.rollout.sampling.max_new_tokens


def activation_bytes(parts: Components, config: PretrainedConfig) -> int:
    """The bytes that a forward pass keeps for each token, by a usual layer's sizes."""
    return usual_bytes(config, parts.model.checkpointing)


def logit_bytes(cfg: DictConfig, config: PretrainedConfig) -> int:
    """The bytes of a chunk of logits, which the head holds a few times over."""
    return 16 * cfg.logits_chunk_size * config.vocab_size


def free_memory(cfg: DictConfig) -> tuple[str, int]:
    """The training device's name, and its free memory in bytes; the processes of one machine share it."""
    name, _ = device(cfg)
    devices = cfg.trainer.devices
    if name == "GPU":
        return name, int(torch.cuda.mem_get_info(devices[0] if isinstance(devices, ListConfig) else None)[0])
    return name, int(psutil.virtual_memory().available) // (devices if isinstance(devices, int) and devices > 1 else 1)


def automatic_tokens(parts: Components, cfg: DictConfig) -> tuple[int, str]:
    """The padded tokens of a forward pass whose activations fit into free memory, and what there was of it, as text.

    A share of what weights, optimizer and teachers leave is used, for estimates are rough and other programs run beside. The
    number is a power of two, so that the processes of a run choose alike.
    """
    weights, config = student(parts, cfg)
    name, free = free_memory(cfg)
    fixed = sum(resident_bytes(parts, cfg, weights).values()) + logit_bytes(cfg, config)
    room = SHARES[name] * max(free - fixed, free / 10) / activation_bytes(parts, config)
    narrow = product_dtype(parts.model, cfg.trainer.precision).itemsize == 2
    enough = (1 + narrow) * ENOUGH / max(2 * weights.layers, 1) if name == "machine" else MOST
    if room > enough:
        return 2 ** int(log2(min(max(enough, LEAST), MOST))), "more would not be faster on a CPU"
    return 2 ** int(log2(min(max(room, LEAST), MOST))), f"{free / GIB:.3g} GiB of the {name}'s memory are free"


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
