"""The check of the chosen logger."""

from importlib.util import find_spec

from omegaconf import DictConfig

from opd_lightning.config.names import find


def check_logger(cfg: DictConfig) -> None:
    """Check that the package of the chosen logger is installed.

    Raises:
        ValueError: it is not.
    """
    package = None if cfg.logger is None else getattr(find(cfg.logger["_target_"]), "needs", None)
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"logger: {package} is not installed; pip install 'opd-lightning[{package}]', or choose another one (logger=none)."
        )
