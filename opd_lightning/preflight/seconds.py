"""The predicted seconds of a step, by the cost model."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from opd_lightning.config.trainer_arguments import processes_of
from opd_lightning.models.cost_model import Model, Rates, Work, predicted
from opd_lightning.models.flops import Sizes
from opd_lightning.preflight.activations import product_dtype, without_weights
from opd_lightning.preflight.checks import CheckResult, lengths
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.resources import estimated
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext

PROMPTS = 64
"""Prompts whose mean length stands for all."""


def seconds(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """A check result with the predicted seconds of a step, by part; see `models.cost_model`."""
    return estimated("seconds", seconds_of)(parts, cfg)


def seconds_of(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """The predicted seconds of a step in which every completion is as long as it may be."""
    kind = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    dtype = product_dtype(parts.model, cfg.trainer.precision)
    lm = without_weights(parts.model)
    if cfg.adapter is not None:
        lm.requires_grad_(False)
    sizes = sizes_of(lm, cfg)
    work = work_of(parts, cfg, sizes)
    found = predicted(work, Rates.measure(torch.device(kind), dtype, lm.config), Model.of(lm, sizes, dtype))
    text = ", ".join(f"{part} {s:.2g}" for part, s in found.items() if s)
    total = f"a step takes about {sum(found.values()):.2g} s at full length"
    yield CheckResult("seconds", "pass", f"{total} ({text}), by this machine's rates")


def sizes_of(lm: PreTrainedModel, cfg: DictConfig) -> Sizes:
    """The sizes of a student, of which an adapter's factors are left out."""
    return Sizes.of(lm) if cfg.adapter is None else replace(Sizes.of(lm), trained=0, trained_head=0)


def work_of(parts: Components, cfg: DictConfig, sizes: Sizes) -> Work:
    """The work of a step on one device."""
    rows = -(-cfg.data.batch_size * parts.rollout.sampling.n // (processes_of(cfg.trainer) or 1))
    prompts = lengths(list(parts.examples[:PROMPTS]), parts.renderer, NoContext(parts.model.template_options))
    prompt, new = round(statistics.mean(prompts)), int(parts.rollout.sampling.max_new_tokens)
    student_writes, read = parts.rollout.student_writes, [prompt + new]
    taught = [sizes if part.source is None else Sizes.of(without_weights(part.source)) for _, part in all_parts(parts.teachers)]
    logits = sum(teacher.logits(new) for teacher in taught)
    flops = {
        "rollout": sizes.write([(prompt, new)]) if student_writes else 0,
        "forward": sizes.read(read) + sizes.logits(new),
        "backward": sizes.backward(read, new),
        "teacher": sum(teacher.read(read) for teacher in taught) + logits,
    }
    flops = {part: rows * n for part, n in flops.items()}
    copied = getattr(parts.generator, "holds_weights", False)
    return Work(flops, new if student_writes and not copied else 0, rows * new, rows * logits)
