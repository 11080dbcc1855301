"""The default of trainer.precision: auto, which a run replaces by one of the Trainer's own before anything is built."""

from omegaconf import DictConfig

AUTO, EXACT, MIXED = "auto", "32-true", "bf16-mixed"
"""The default, and the two that it may become."""


def is_auto(cfg: DictConfig) -> bool:
    """Whether trainer.precision is still open."""
    return str(cfg.trainer.precision) == AUTO


def with_precision(cfg: DictConfig, precision: str = EXACT) -> DictConfig:
    """The configuration with a precision in the place of `auto`; one that was set stays."""
    if not is_auto(cfg):
        return cfg
    cfg = cfg.copy()
    cfg.trainer.precision = precision
    return cfg
