"""Do student and teachers read and write as the losses take it? The first check that loads weights."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.generation.batches import TOLD, widest
from opd_lightning.models import Student, adapters
from opd_lightning.preflight.checks import Finding
from opd_lightning.preflight.components import Components


def load(parts: Components, cfg: DictConfig) -> Student:
    """The student on its device, as training would have it, with its teachers set up.

    Raises:
        ValueError: a model, or the adapter, is refused.
    """
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    lm = parts.model.model()
    adapter = build(cfg.adapter)
    if adapter is not None:
        adapters.add(lm, adapter)
    student = Student(lm, cfg.logits_chunk_size, parts.renderer.words).to(device)
    student.verify_head(f"model.path={parts.model.path}")
    for teacher in parts.teachers.values():
        teacher.setup(student, parts.renderer)
    return student


def architecture(parts: Components, student: Student) -> Iterator[Finding]:
    """What was found of a student that `load` accepts."""
    kind, adapted = type(student.lm).__name__, len(adapters.layers(student.lm))
    more = f"; the adapter changes {adapted} layers" if adapted else ""
    yield Finding("architecture", "pass", f"{kind}: backbone and output layer together are the model{more}")
    with student.evaluating() as lm:
        batch = widest(lm, parts.renderer.render(parts.examples[0].messages).token_ids)
    if batch != "any":
        yield Finding("architecture", "warn", f"{kind} continues prompts otherwise in a batch; written are {TOLD[batch]}.")
