"""Estimates of the memory and disk space of a run."""

import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from math import log2
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, ListConfig

from opd_lightning.config.trainer_arguments import processes_of
from opd_lightning.models import Pretrained
from opd_lightning.preflight.activations import Shapes, product_dtype, without_weights
from opd_lightning.preflight.checks import CheckResult, lengths
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.memory_plan import Batch, Plan, models_of, plan, shapes_of, trained
from opd_lightning.preflight.rendering import as_played
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext

Planner = Callable[[int | None, int, bool], Plan]
"""The plan for a number of padded tokens of a pass (None: all), of devices, spread or not."""

GIB = 2**30
SHARES = {"GPU": 0.5, "machine": 0.25}
"""The share of free memory that activations may take; a machine's is shared with other programs."""
LEAST, MOST = 256, 2**20
"""Bounds of the automatic number of tokens."""
ENOUGH = 6e10
"""FLOPs of a float32 forward pass from which a CPU is hardly faster with more tokens, which take memory; of 16 bits twice."""


def size_of(model: Pretrained) -> int:
    """All parameters of a model, without loading it."""
    return sum(p.numel() for p in without_weights(model).parameters())


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
    """Check results on the planned memory of one device in the phase that takes most, and on 1, 4 and 8 devices.

    The latter are without loading, which on a GPU's machine takes the host's memory.
    """
    made, (name, capacity) = planner(parts, cfg), device(cfg)
    if (minimum := made[1](1, *spread_of(cfg)).student) > capacity:
        text = f"weights, gradients and optimizer alone take {minimum / GIB:.2g} GiB of the {name}'s {capacity / GIB:.2g}"
        yield CheckResult(
            "memory", "fail", f"{text}; choose a smaller model, adapter=lora, or trainer=fsdp2 with more devices."
        )
        return
    own, others = plans_of(parts, cfg, made)
    breakdown = ", ".join(f"{part} {size / GIB:.2g}" for part, size in own.parts.items())
    state = "pass" if own.peak < 0.7 * capacity else "warn"
    remedy = "" if state == "pass" else f"; {own.remedy(cfg)}"
    more = "; ".join(f"{words(other.devices, way)} {other.loaded / GIB:.2g}" for way, other in others)
    text = f"about {own.peak / GIB:.2g} GiB in the {own.phase} ({breakdown}) of the {name}'s {capacity / GIB:.3g}"
    beside = "" if parts.environment is None else "; the environment's answers come on top"
    yield CheckResult("memory", state, f"{text}{beside}{remedy}. Each of, once loaded: {more}")


def words(devices: int, way: str) -> str:
    """Devices and their strategy."""
    return "1 device" if devices == 1 else f"{devices} devices with {way}"


def plans_of(
    parts: Components, cfg: DictConfig, made: tuple[Shapes, Planner] | None = None
) -> tuple[Plan, list[tuple[str, Plan]]]:
    """The plan of the run's memory, and what it would be on 1, 4 and 8 devices, by the strategy; `made` is its planner."""
    shapes, planned = made or planner(parts, cfg)
    given = cfg.max_tokens_per_microbatch
    most = fitting_tokens(parts, cfg, shapes, planned)[0] if given == "auto" else given
    ways = [("trainer=ddp", False), ("trainer=fsdp2", True)]
    others = [(way, planned(most, n, spread)) for n in (4, 8) for way, spread in ways]
    return planned(most, *spread_of(cfg)), [("", planned(most, 1, False)), *others]


def spread_of(cfg: DictConfig) -> tuple[int, bool]:
    """The run's devices, and whether its weights are spread over them."""
    return processes_of(cfg.trainer) or 1, "ModelParallel" in str(cfg.trainer.strategy)


def planner(parts: Components, cfg: DictConfig) -> tuple[Shapes, Planner]:
    """The student's shapes, and what plans with them."""
    shapes, (rows, length) = shapes_of(parts, cfg), batch_shape(parts, cfg)
    local = [(name, part.source) for name, part in all_parts(parts.teachers) if part.source and not part.shares_weights]
    sources = {name: size_of(source) for name, source in [*local, *models_of(parts.environment).items()]}

    def planned(most: int | None, devices: int, spread: bool) -> Plan:
        batch = Batch(rows, length, parts.rollout.sampling.max_new_tokens, most)
        return plan(parts, cfg, shapes, sources, batch, devices, spread)

    return shapes, planned


def batch_shape(parts: Components, cfg: DictConfig) -> tuple[int, int]:
    """The samples of a rollout, and the longest of them in tokens; what environments will answer is not known."""
    shown = as_played(parts.examples[:512], parts.environment)
    longest = max(lengths(shown, parts.renderer, NoContext(parts.model.template_options)), default=0)
    return cfg.data.batch_size * parts.rollout.sampling.n, longest + parts.rollout.sampling.max_new_tokens


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
    return fitting_tokens(parts, cfg, *planner(parts, cfg))


def fitting_tokens(parts: Components, cfg: DictConfig, shapes: Shapes, planned: Planner) -> tuple[int, str]:
    """`automatic_tokens` by a planner."""
    name, free = free_memory(cfg)
    own = planned(1, *spread_of(cfg))
    fixed = sum(own.resident.values()) + sum(size for part, size in own.phases["update"].items() if part != "activations")
    room = SHARES[name] * max(free - fixed, free / 10) / shapes.pass_of_token
    narrow = product_dtype(parts.model, cfg.trainer.precision).itemsize == 2
    enough = (1 + narrow) * ENOUGH / max(2 * shapes.layers, 1) if name == "machine" else MOST
    if room > enough:
        return 2 ** int(log2(min(max(enough, LEAST), MOST))), "more would not be faster on a CPU"
    return 2 ** int(log2(min(max(room, LEAST), MOST))), f"{free / GIB:.3g} GiB of the {name}'s memory are free"


def disk_of(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on disk space for two checkpoints: a new one is written before the last is removed."""
    need = 2 * sum(trained(parts, cfg, shapes_of(parts, cfg)))
    folder = Path(str(cfg.output_dir)).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"two checkpoints take about {need / GIB:.2g} GiB of {free / GIB:.3g} free at {folder}"
    state = "pass" if need < free else "warn"
    yield CheckResult("disk", state, text if state == "pass" else f"{text}; make room, or choose another output_dir.")
