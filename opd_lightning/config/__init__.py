"""Configuration: composing, instantiating and checking it."""

from opd_lightning.config.composing import CONF_DIR, compose, first_stage, plain
from opd_lightning.config.instantiate import build

__all__ = ["CONF_DIR", "build", "compose", "first_stage", "plain"]
