"""The check of the chosen logger."""

import ast
from importlib.util import find_spec

from omegaconf import DictConfig

from opd_lightning.config.names import find
from opd_lightning.config.signatures import SLOW, lookup


def check_logger(cfg: DictConfig) -> None:
    """Check that the package of the chosen logger is installed.

    Raises:
        ValueError: it is not.
    """
    package = None if cfg.logger is None else package_of(cfg.logger["_target_"])
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"logger: {package} is not installed; pip install 'opd-lightning[{package}]', or choose another one (logger=none)."
        )


def package_of(target: str) -> str | None:
    """The package that a logger's `needs` names; read from the source where an import takes seconds."""
    module, _, name = target.rpartition(".")
    if target.split(".", maxsplit=1)[0] not in SLOW:
        return getattr(find(target), "needs", None)
    found = lookup(module, name)
    for node in found.node.body if found is not None and isinstance(found.node, ast.ClassDef) else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "needs":
            return str(ast.literal_eval(node.value))
    return None
