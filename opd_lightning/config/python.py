"""Composing from Python, with the errors of the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opd_lightning.config.overrides import configured


def compose(overrides: Sequence[str] = (), folders: Sequence[str | Path] = ()) -> DictConfig:
    """The configuration from overrides such as "method=sft"; `folders` hold users' own options.

    Raises:
        ValueError: an override or a folder is wrong.
    """
    given: Any = overrides
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(word, str) for word in given):
        raise ValueError(f'compose takes a list of overrides, such as ["method=sft", "optim.lr=1e-4"], not {given!r}.')
    return configured([*(f"--config-dir={folder}" for folder in folders), *given])
