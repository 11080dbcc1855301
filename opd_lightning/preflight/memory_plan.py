"""The plan of a run's memory: what each device holds in each phase of a step, from shapes alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.losses.head import BLOCK
from opd_lightning.models import Pretrained
from opd_lightning.models.packed import onednn
from opd_lightning.preflight.activations import Shapes, cache_bytes, product_dtype, state_bytes
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.memory_remedies import remedies
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.weights import Parameters

BITS = {"nf4": 4.127, "fp4": 4.127}
"""Bits of a weight with its share of the scales, which are stored in 8 bits for 64 weights."""


@dataclass(frozen=True)
class Plan:
    """Bytes on one device: what stays all the time, and what each phase of a step adds.

    Attributes:
        devices: how many there are.
        resident, phases: by name.
    """

    devices: int
    resident: dict[str, float]
    phases: dict[str, dict[str, float]]

    def bytes_in(self, phase: str) -> float:
        """All bytes of a phase."""
        return sum((self.resident | self.phases[phase]).values())

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.bytes_in)

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the phase that takes most, those that take nothing left out."""
        return {name: size for name, size in (self.resident | self.phases[self.phase]).items() if size}

    @property
    def peak(self) -> float:
        """All bytes of the phase that takes most."""
        return self.bytes_in(self.phase)

    @property
    def loaded(self) -> float:
        """All bytes of the phase that takes most of those behind loading."""
        return max(self.bytes_in(name) for name in self.phases if name != "load")

    @property
    def student(self) -> float:
        """The bytes of the student's weights, gradients and optimizer, without which no update is made."""
        return self.resident["weights"] + self.resident["optimizer"] + self.phases["update"]["gradients"]

    def remedy(self, cfg: DictConfig) -> str:
        """The keys that make its greatest part smaller, of those that are left to turn."""
        for name in sorted(self.parts, key=lambda name: -self.parts[name]):
            if name in ("optimizer", "gradients") and cfg.adapter is not None:
                continue  # an adapter's are small
            if found := remedies(name, cfg):
                return f"{name} take most: {found}"
        return ""


@dataclass(frozen=True)
class Batch:
    """The sizes of one update on all devices: samples, tokens of the longest, padded tokens of a pass (None: all)."""

    rows: int
    length: int
    completion: int
    budget: int | None

    def on(self, devices: int) -> "Batch":
        """The share of one device."""
        return replace(self, rows=-(-self.rows // devices))

    @property
    def tokens(self) -> int:
        """Padded tokens of a forward pass."""
        rows = self.rows if self.budget is None else min(self.rows, max(1, self.budget // self.length))
        return rows * self.length


def width_of(dtype: torch.dtype) -> int:
    """Bytes of a number."""
    return torch.finfo(dtype).bits // 8


def shapes_of(parts: Components, cfg: DictConfig) -> Shapes:
    """The student on tensors without data."""
    narrow = torch.bfloat16 if "bf16" in str(cfg.trainer.precision) else None
    return Shapes(parts.model, build(cfg.adapter), narrow)


def plan(
    parts: Components, cfg: DictConfig, shapes: Shapes, sources: dict[str, int], batch: Batch, devices: int, sharded: bool
) -> Plan:
    """The plan for so many devices.

    Args:
        sources: numbers of each teacher that has weights of its own, and of the environment's models, by name.
        sharded: whether the student is spread over the devices.
    """
    config, width, shards = parts.model.config(), width_of(parts.model.dtype), devices if sharded else 1
    batch, (gradients, states) = batch.on(devices), trained(parts, cfg, shapes)
    plain = (shapes.all - shapes.linear) * width
    frozen = shapes.linear * (
        BITS[cfg.adapter.quantization] / 8 if cfg.adapter is not None and "quantization" in cfg.adapter else width
    )
    weights = plain + frozen + 4 * shapes.added
    resident = {"weights": weights / shards, "optimizer": states / shards}
    whole = teachers(parts, shapes, sources, width, cfg)
    resident |= at_rest(parts, whole, shards, cfg)
    resident |= {name: sources[name] * width_of(model.dtype) for name, model in models_of(parts.environment).items()}
    gradients /= shards
    gathered = weights - weights / shards
    names = [name for name, _ in all_parts({k: v for k, v in parts.teachers.items() if k in parts.objective.teachers})]
    hidden = 4 * batch.rows * batch.completion * config.hidden_size * len(names)
    moving = sum(not part.frozen and part.gives_hidden_states for _, part in all_parts(parts.teachers))
    own = [p.gives_hidden_states and not p.source and not (p.frozen and whole[n]) for n, p in all_parts(parts.teachers)]
    copied = 4 * moving if shapes.trained > shapes.added else width * sum(own) * (shards > 1)
    scores = hidden + shapes.head * copied + heads(parts, whole, shards)
    chunk = 4 * min(cfg.logits_chunk_size, batch.rows * batch.completion) * config.vocab_size
    head = chunk * (1 + len(names)) + 4 * min(BLOCK, chunk)
    table = 4 * shapes.head if shapes.trained >= shapes.head and cfg.adapter is None else 0
    activations = batch.tokens * shapes.pass_of_token
    update = {"activations": activations, "logits": head + table, "scores": scores, "gradients": gradients}
    reading = {"gradients": gradients, "gathered weights": gathered, "activations": batch.tokens * shapes.layer / 2}
    reading |= {"scores": scores, "gathered teacher": max(gathered_to_read(parts, whole, shards, cfg), default=0.0)}
    phases = {"update": update, "score": reading, "load": loading(parts, cfg, shapes.all * width, whole, shards)}
    if parts.rollout.student_writes or parts.rollout.teachers:
        cached = batch.rows * batch.length * cache_bytes(config, width)
        logits = 8 * batch.rows * config.vocab_size
        phases["rollout"] = {"gradients": gradients, "gathered weights": gathered, "rollout cache": cached, "logits": logits}
        phases["rollout"]["packed weights"] = packed(parts, cfg, shapes, width)
        if parts.rollout.teachers:
            phases["rollout"]["gathered teacher"] = sum(whole.values()) - sum(at_rest(parts, whole, shards, cfg).values())
    return Plan(devices, resident, phases)


def trained(parts: Components, cfg: DictConfig, shapes: Shapes) -> tuple[float, float]:
    """The bytes of the weights that are trained, which are those of their gradients, and of the optimizer's state."""
    states = state_bytes(lambda some: build(cfg.optim).build(some, 1)[0])
    return float(shapes.trained * (4 if cfg.adapter is not None else width_of(parts.model.dtype))), states * shapes.trained


def models_of(environment: Any) -> dict[str, Pretrained]:
    """The models of an environment that stay in memory beside the student, by name."""
    return getattr(environment, "models", {})


def teachers(parts: Components, shapes: Shapes, sources: dict[str, int], width: int, cfg: DictConfig) -> dict[str, float]:
    """The bytes of each teacher as a whole, by name."""
    start = Parameters(shapes.all, shapes.linear, shapes.trained, width, cfg.adapter is not None)
    return {
        name: sources.get(name, 0) * (width_of(part.source.dtype) if part.source else 0) + part.footprint(start)
        for name, part in all_parts(parts.teachers)
    }


def on_gpu(cfg: DictConfig) -> bool:
    """Whether the run's devices are GPUs, so that the host is elsewhere."""
    return torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"


def at_rest(parts: Components, whole: dict[str, float], shards: int, cfg: DictConfig) -> dict[str, float]:
    """The bytes of each teacher that are on one device all the time."""
    offloaded = {name for name, part in all_parts(parts.teachers) if part.offload and on_gpu(cfg)}
    return {name: 0.0 if name in offloaded else size / shards for name, size in whole.items()}


def gathered_to_read(parts: Components, whole: dict[str, float], shards: int, cfg: DictConfig) -> Iterator[float]:
    """The bytes that each teacher takes beside those at rest while it reads: two layers of a spread one, and its tables."""
    rest = at_rest(parts, whole, shards, cfg)
    for name, part in all_parts(parts.teachers):
        if part.frozen and shards > 1:
            layers = (part.source or parts.model).config().num_hidden_layers
            yield min(whole[name], 2 * head_bytes(parts, part) + 2 * whole[name] / layers)
        else:
            yield whole[name] - rest[name]


def heads(parts: Components, whole: dict[str, float], shards: int) -> float:
    """The bytes of the copies of output layers that the scores of spread and of offloaded teachers hold."""
    found = [part for name, part in all_parts(parts.teachers) if whole[name] and part.frozen and (shards > 1 or part.offload)]
    return float(sum(head_bytes(parts, part) for part in found))


def head_bytes(parts: Components, part: Any) -> int:
    """The bytes of a teacher's output layer."""
    model = part.source or parts.model
    config = model.config()
    return int(config.vocab_size * config.hidden_size * width_of(model.dtype))


def loading(parts: Components, cfg: DictConfig, student: float, whole: dict[str, float], shards: int) -> dict[str, float]:
    """The bytes beside what stays while weights are copied out of their files, before there is an optimizer.

    Files, and teachers that are spread later, are on the host; a GPU has only the student, and copies of it, as a whole.
    """
    if on_gpu(cfg):
        copies = sum(whole[name] for name, part in all_parts(parts.teachers) if part.frozen and part.source is None)
        return {"optimizer": 0.0, "weights that are spread": (student + copies) * (1 - 1 / shards)}
    most = max([student, *(whole[name] for name, part in all_parts(parts.teachers) if part.source)])
    spread_later = max([student, *whole.values()]) * (1 - 1 / shards)
    return {"optimizer": 0.0, "files": float(most), "weights that are spread": spread_later}


def packed(parts: Components, cfg: DictConfig, shapes: Shapes, width: int) -> float:
    """The bytes of the copies of weights that decoding uses; see `models.packed`."""
    if not getattr(parts.generator, "pack_weights", False):
        return 0.0
    narrow = product_dtype(parts.model, cfg.trainer.precision)
    if not (narrow != parts.model.dtype or (not on_gpu(cfg) and onednn(narrow))):
        return 0.0
    table = 0 if shapes.tied else shapes.head  # an embedding is no product
    quantized = cfg.adapter is not None and "quantization" in cfg.adapter
    return float((shapes.all - table - (shapes.linear if quantized else 0)) * width_of(narrow))
