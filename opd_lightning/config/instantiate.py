"""Instantiating: how a node of the configuration becomes an object, and what is said when it cannot."""

import inspect
import re
from typing import Any

import hydra
from hydra.errors import InstantiationException
from hydra.utils import get_object
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config.aliases import has_old_names, modernised


def build(node: DictConfig | dict | None, **offers: Any) -> Any:
    """The object that a node's `_target_` describes; None for None.

    Args:
        offers: arguments that only the program knows, such as the tokenizer. The target and the targets inside it take
            those that they name.

    Raises:
        ValueError: what the target raised on its arguments, in its own words.
    """
    if node is None:
        return None
    if has_old_names(plain := OmegaConf.to_container(node) if isinstance(node, DictConfig) else node):
        resolved = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else plain
        node = OmegaConf.create(modernised(resolved))
    try:
        return hydra.utils.instantiate(node, _convert_="all", **accepted(node, offers))
    except InstantiationException as error:
        told = explained(error, node)
        if told is None:
            raise
        raise ValueError(told) from error


def explained(error: InstantiationException, node: DictConfig | dict) -> str | None:
    """One sentence for what a target raised on its arguments; None for what is no matter of arguments.

    This program's own errors name their field; what a library says is told with the node that it is about.
    """
    cause = error.__cause__
    foreign = not str(node.get("_target_")).startswith("opd_lightning")
    if isinstance(cause, ValueError) and not foreign and re.match(r"\w+=", str(cause)):
        return f"{found[1]}.{cause}" if (found := re.search(r"full_key: (\S+)$", str(error))) else str(cause)
    if isinstance(cause, ImportError) or (isinstance(cause, ValueError) and not foreign):
        return str(cause)
    if not foreign or not isinstance(cause, (ValueError, TypeError, MisconfigurationException)):
        return None
    place = (node._get_full_key(None) if isinstance(node, DictConfig) else "") or str(node.get("_target_"))
    return f"{place} cannot be made of its options ({' '.join(str(cause).split())[:300]}); change them ({place}.<option>=...)."


def accepted(node: DictConfig | dict, offers: dict[str, Any]) -> dict[str, Any]:
    """The offers that a node's target names and the configuration does not give, and within it those of its parts."""
    taken: dict[str, Any] = {}
    if "_target_" in node and not node.get("_partial_"):
        names = inspect.signature(get_object(node["_target_"])).parameters
        taken = {name: value for name, value in offers.items() if name in names and name not in node}
    for key, part in node.items():
        if isinstance(part, (dict, DictConfig)) and (inside := accepted(part, offers)):
            taken[str(key)] = inside
    return taken
