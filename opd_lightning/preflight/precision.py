"""Do updates of the configured size move the weights, in the type that they are trained in?"""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.models import adapters
from opd_lightning.models.optimizer import rounding
from opd_lightning.preflight.checks import Finding
from opd_lightning.preflight.components import Components


def precision(parts: Components, cfg: DictConfig, fast: bool = False) -> Iterator[Finding]:
    """The share of the weights that one update moves; weights are loaded only where it is in doubt, and never if `fast`."""
    chosen, dtype = str(cfg.trainer.precision), parts.model.dtype
    trained = torch.bfloat16 if chosen == "bf16-true" else torch.float32 if cfg.adapter is not None else dtype
    if torch.finfo(trained).bits >= 32:
        yield Finding("precision", "pass", f"weights are trained in {str(trained).removeprefix('torch.')}, precision {chosen}")
        return
    if fast:
        text = "weights are trained in bfloat16, where small updates are rounded away; without --fast the share is told"
        yield Finding("precision", "warn", text)
        return
    lm = parts.model.model()
    if cfg.adapter is not None:
        adapters.add(lm, build(cfg.adapter))
    told = rounding([p for p in lm.parameters() if p.requires_grad], cfg.optim.lr, trained)
    yield Finding("precision", "warn", str(told))
