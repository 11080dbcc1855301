"""Result: the number that a run returns to Hydra, for sweepers that search, such as Optuna's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, ListConfig

from opd_lightning.runs.metrics_file import read_csv

KINDS = ("eval/", "train/", "rollout/", "cost/")


def result_names(cfg: DictConfig) -> list[str]:
    """The names under `optimize`; none where it is null.

    Raises:
        ValueError: one is no name of a logged number.
    """
    given = cfg.get("optimize")
    names = [] if given is None else list(given) if isinstance(given, ListConfig) else [given]
    for name in names:
        if not isinstance(name, str) or not name.startswith(KINDS):
            raise ValueError(
                f"optimize={name!r} is no logged number, such as eval/new/accuracy or train/loss; columns of metrics.csv have "
                "them all."
            )
    return names


def result(cfg: DictConfig, folder: Path) -> float | tuple[float, ...] | None:
    """The last logged values of `optimize`: a number, several where it is a list, None where it is null.

    Raises:
        ValueError: the run has not logged one.
    """
    names = result_names(cfg)
    last: dict[str, Any] = {}
    for row in read_csv(folder / "metrics.csv") if names else []:
        last |= row
    for name in names:
        if name not in last:
            raise missing(name, last)
    if not names:
        return None
    return tuple(last[name] for name in names) if isinstance(cfg.optimize, ListConfig) else last[names[0]]


def missing(name: str, available: Sequence[str] | dict[str, Any]) -> ValueError:
    """The error for a number that a run does not log."""
    kind = name.split("/", maxsplit=1)[0] + "/"
    known = sorted(other for other in available if other.startswith(kind))
    return ValueError(f"optimize={name} is not logged by this run, which has {', '.join(known) or f'no {kind}'}.")


class Result(L.Callback):
    """Checks after the first evaluation that the run measures what it is to return.

    Args:
        names: of logged numbers.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Raises ValueError for a number of the evaluation that it lacks."""
        for name in self.names:
            if name.startswith("eval/") and name not in trainer.callback_metrics:
                raise missing(name, list(trainer.callback_metrics))
