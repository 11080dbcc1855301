"""The parts of training that a run and `Distillation` share: checks before it, the module and its data."""

import logging
from itertools import chain
from typing import Any

from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.data.prompts import PromptData
from opd_lightning.models.stand_in import NOT_VERIFIED
from opd_lightning.module import DistillationModule
from opd_lightning.preflight.checks import models, updates, verifier
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.references import references
from opd_lightning.preflight.rendering import left_rows
from opd_lightning.preflight.replies import replies
from opd_lightning.preflight.resources import memory
from opd_lightning.preflight.results import raise_on_failures
from opd_lightning.preflight.weights import weights
from opd_lightning.utils.in_memory import SCHEME, in_python

log = logging.getLogger(__name__)


def checked(parts: Components, cfg: DictConfig) -> dict[str, Any]:
    """Check data, models, replies, references and memory, and log the warnings.

    Returns:
        The counts of `Components.preflight`.

    Raises:
        ValueError: a check fails.
    """
    if parts.model.stand_in:
        log.warning(f"warning: {NOT_VERIFIED}")
    notes = parts.preflight()
    if "columns" in notes:
        log.info(notes["columns"])
    texts = chain(left_rows(parts), models(parts), replies(parts), references(parts))
    for warning in raise_on_failures(chain(texts, verifier(parts, 16), memory(parts, cfg), updates(parts, cfg))):
        log.warning(f"warning: {in_python(warning) if SCHEME in warning else warning}")
    raise_on_failures(weights(parts))  # what it warns of is said where they are loaded
    return notes


def warn_of_near_duplicates(notes: dict[str, Any]) -> None:
    """Log a warning if training prompts nearly repeat held-out ones."""
    if notes["near_duplicates"]:
        log.warning(
            f"warning: {notes['near_duplicates']} of {notes['train']} training prompts nearly repeat a held-out one, such as "
            f"{notes['near_duplicates_first'][0]}; status.json has more."
        )


def module_arguments(parts: Components, cfg: DictConfig) -> dict[str, Any]:
    """The arguments of `DistillationModule`."""
    return {
        "model": parts.model,
        "renderer": parts.renderer,
        "generator": parts.generator,
        "rollout": parts.rollout,
        "objective": parts.objective,
        "teachers": parts.teachers,
        "optim": build(cfg.optim),
        "seed": cfg.seed,
        "verify": parts.task.verify if parts.task.verifies else None,
        "max_tokens_per_microbatch": cfg.max_tokens_per_microbatch,
        "logits_chunk_size": cfg.logits_chunk_size,
        "adapter": build(cfg.adapter),
    }


def module_of(parts: Components, cfg: DictConfig) -> DistillationModule:
    """The module of a run."""
    return DistillationModule(**module_arguments(parts, cfg))


def data_arguments(parts: Components, cfg: DictConfig) -> dict[str, Any]:
    """The arguments of `PromptData`."""
    return {
        "examples": parts.examples,
        "renderer": parts.renderer,
        "batch_size": cfg.data.batch_size,
        "seed": cfg.seed,
        "num_iterations": parts.rollout.num_iterations,
    }


def data_of(parts: Components, cfg: DictConfig) -> PromptData:
    """The data of a run."""
    return PromptData(**data_arguments(parts, cfg))
