"""The precision check: the share of the weights that an update of the configured size changes, in their dtype."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.models import adapters
from opd_lightning.models.optimizer import rounding
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components


def precision(parts: Components, cfg: DictConfig, fast: bool = False) -> Iterator[CheckResult]:
    """Check results on the share of the weights that one update changes; 16-bit weights are loaded for it unless `fast`."""
    trainer_precision, dtype = str(cfg.trainer.precision), parts.model.dtype
    trained = torch.bfloat16 if trainer_precision == "bf16-true" else torch.float32 if cfg.adapter is not None else dtype
    if torch.finfo(trained).bits >= 32:
        yield CheckResult(
            "precision", "pass", f"weights are trained in {str(trained).removeprefix('torch.')}, precision {trainer_precision}"
        )
        return
    if fast:
        text = "weights are trained in bfloat16, where small updates are rounded away; --fast leaves out the share"
        yield CheckResult("precision", "warn", text)
        return
    lm = parts.model.model()
    if cfg.adapter is not None:
        adapters.add(lm, build(cfg.adapter))
    message = rounding([p for p in lm.parameters() if p.requires_grad], cfg.optim.lr, trained)
    yield CheckResult("precision", "warn", str(message))
