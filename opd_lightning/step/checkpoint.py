"""Checkpoints: what is saved beside Lightning's own, and checks when it is restored."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lightning.data.batching import Batch
from opd_lightning.models.shards import check_shapes
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.fingerprint import Fingerprint, another_model

log = logging.getLogger(__name__)


def save(module: Any, checkpoint: dict[str, Any]) -> None:
    """Add the ledger, teachers, fingerprints and pending rollouts; of a student with an adapter only trained weights stay."""
    checkpoint |= module.rollouts.state_dict()
    checkpoint["ledger"] = module.ledger.state_dict()
    checkpoint["teachers"] = {name: teacher.state_dict() for name, teacher in module.teachers.items()}
    checkpoint["fingerprints"] = {role: fingerprint.numbers for role, fingerprint in fingerprints(module).items()}
    checkpoint["engine"] = module.engine
    if module.adapter is not None:
        trained = {f"student.{name}" for name, p in module.student.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def restore(module: Any, checkpoint: dict[str, Any]) -> None:
    """Restore the ledger, the teachers and pending rollouts.

    Raises:
        ValueError: the checkpoint is of another program, method or model, or of other teachers.
    """
    if "ledger" not in checkpoint or set(checkpoint.get("teachers", {})) != set(module.teachers):
        raise ValueError("checkpoints/last.ckpt is of another program or method; remove it, or choose another study.name.")
    saved = checkpoint.get("state_dict", {})  # FSDP2 reads it separately
    own = {name: value.shape for name, value in module.state_dict().items()}
    check_shapes({name: value.shape for name, value in saved.items()}, own)
    check_unchanged(module, checkpoint)
    module.ledger.load_state_dict(checkpoint["ledger"])
    module.rollouts.load_state_dict(checkpoint)
    for name, teacher in module.teachers.items():
        teacher.load_state_dict(checkpoint["teachers"][name])


def fingerprints(module: Any) -> dict[str, Fingerprint]:
    """The fingerprints of the models that a checkpoint does not hold, by their role."""
    known = {role: part.fingerprint for role, part in all_parts(module.teachers)} | {"start model": module.base}
    return {role: fingerprint for role, fingerprint in known.items() if fingerprint is not None}


def check_unchanged(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check that the models beside the checkpoint are those it was trained with; warn of another engine.

    Raises:
        ValueError: one is another.
    """
    if sentence := another_model(checkpoint.get("fingerprints", {}), fingerprints(module)):
        raise ValueError(f"{sentence}. This run has learned from the earlier one: bring it back, or choose another study.name.")
    before, writes = checkpoint.get("engine", module.engine), module.rollout.student_writes or module.rollout.teachers
    if writes and before != module.engine and module.global_rank == 0:
        log.warning(
            f"warning: {before} wrote this run's completions before, and {module.engine} goes on: from here they are other "
            "draws than those of the run without a break."
        )


def dump(module: Any, reason: str, batch: Batch, losses: Tensor) -> ValueError:
    """The error for an update that cannot be made; the batch is saved for inspection, one file per device."""
    step = module.global_step + 1
    path = Path(module.trainer.default_root_dir) / f"nonfinite-step-{step}-rank-{module.global_rank}.pt"
    texts = module.renderer.decode_all([sample.completion_ids for sample in batch.samples])
    torch.save({"step": step, **batch.describe(texts), "loss": losses.cpu()}, path)
    return ValueError(
        f"update {step}: {reason} The weights are still those before it, the batch is in {path}, and the last rows of "
        "metrics.csv show how it came."
    )
