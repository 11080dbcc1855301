"""The architecture check of the student, with its losses and generation; the first check that loads weights."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.generation.batches import GROUPING, batch_support
from opd_lightning.models import Student, adapters
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components


def load(parts: Components, cfg: DictConfig) -> Student:
    """The student on the training device, with its adapter and its teachers set up.

    Raises:
        ValueError: a model, or the adapter, is refused.
    """
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    lm = parts.model.model()
    adapter = build(cfg.adapter)
    if adapter is not None:
        adapters.add(lm, adapter)
    student = Student(lm, cfg.logits_chunk_size, parts.renderer.valid_ids).to(device)
    student.verify_head(f"model.path={parts.model.path}")
    for teacher in parts.teachers.values():
        teacher.setup(student, parts.renderer)
    return student


def architecture(parts: Components, student: Student) -> Iterator[CheckResult]:
    """Check results on the architecture of a student that `load` accepts."""
    kind, adapted = type(student.lm).__name__, len(adapters.layers(student.lm))
    adapter_note = f"; the adapter changes {adapted} layers" if adapted else ""
    yield CheckResult("architecture", "pass", f"{kind}: backbone and output layer together are the model{adapter_note}")
    with student.eval_mode() as lm:
        batch = batch_support(lm, parts.renderer.render(parts.examples[0].messages).token_ids)
    if batch != "any":
        yield CheckResult("architecture", "warn", f"{kind}'s completions depend on the batch; generated for {GROUPING[batch]}.")
