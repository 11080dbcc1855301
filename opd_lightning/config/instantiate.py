"""Instantiating: objects from nodes of the configuration, and the error messages."""

import inspect
import re
from typing import Any

import hydra
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config.aliases import has_old_names, modernised


def build(node: DictConfig | dict | None, **offers: Any) -> Any:
    """The object that a node's `_target_` describes; None for None.

    Args:
        offers: arguments from the program, such as the tokenizer. The target and the targets inside it get those that they
            name.

    Raises:
        ValueError: the target refuses its arguments, with its own message.
    """
    if node is None:
        return None
    if has_old_names(plain := OmegaConf.to_container(node) if isinstance(node, DictConfig) else node):
        resolved = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else plain
        node = OmegaConf.create(modernised(resolved))
    try:
        return hydra.utils.instantiate(node, _convert_="all", **accepted_offers(node, offers))
    except InstantiationException as error:
        message = argument_error(error, node)
        if message is None:
            raise
        raise ValueError(message) from error


def argument_error(error: InstantiationException, node: DictConfig | dict) -> str | None:
    """The message for a target that refuses its arguments; None for other errors.

    This package's errors name their field; to those of libraries the node is added.
    """
    cause = error.__cause__
    foreign = not str(node.get("_target_")).startswith("opd_lightning")
    if isinstance(cause, ValueError) and not foreign and re.match(r"\w+=", str(cause)):
        key = re.search(r"full_key: (\S+)$", str(error))
        chosen = key is not None and str(cause).startswith(f"{key[1].split('.')[0]}=")  # as generator=vllm, which is whole
        return str(cause) if key is None or chosen else f"{key[1]}.{cause}"
    if isinstance(cause, ImportError) or (isinstance(cause, ValueError) and not foreign):
        return str(cause)
    lightnings = type(cause).__name__ == "MisconfigurationException"  # by name, for Lightning may not be imported
    if not foreign or not (lightnings or isinstance(cause, (ValueError, TypeError))):
        return None
    place = (node._get_full_key(None) if isinstance(node, DictConfig) else "") or str(node.get("_target_"))
    return f"{place} cannot be made of its options ({' '.join(str(cause).split())[:300]}); change them ({place}.<option>=...)."


def accepted_offers(node: DictConfig | dict, offers: dict[str, Any]) -> dict[str, Any]:
    """The offers that a node's target names and the configuration does not set, nested for its parts."""
    arguments: dict[str, Any] = {}
    if "_target_" in node and not node.get("_partial_"):
        names = inspect.signature(get_object(node["_target_"])).parameters
        arguments = {name: value for name, value in offers.items() if name in names and name not in node}
    for key, part in node.items():
        if isinstance(part, (dict, DictConfig)) and (nested := accepted_offers(part, offers)):
            arguments[str(key)] = nested
    return arguments
