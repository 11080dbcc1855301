"""Token limits that follow the data: null in the configuration, a number after the data is read."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_lightning.config.composing import plain

LEAST = 128
"""The smallest limit that follows the data."""


def limited(cfg: DictConfig, tokens: int) -> DictConfig:
    """The configuration with `tokens` for every max_new_tokens that is null."""
    tree = plain(cfg)
    return OmegaConf.create(filled(tree, tokens)) if has_open_limit(tree) else cfg


def has_open_limit(node: Any) -> bool:
    """Whether a max_new_tokens is null."""
    if isinstance(node, dict):
        return any((key == "max_new_tokens" and value is None) or has_open_limit(value) for key, value in node.items())
    return isinstance(node, list) and any(map(has_open_limit, node))


def filled(node: Any, tokens: int) -> Any:
    """A tree with `tokens` for every max_new_tokens that is null."""
    if isinstance(node, list):
        return [filled(value, tokens) for value in node]
    if not isinstance(node, dict):
        return node
    return {k: tokens if k == "max_new_tokens" and v is None else filled(v, tokens) for k, v in node.items()}
