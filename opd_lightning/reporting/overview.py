"""Overview: the state of each cell after a sweep, with the reason where it is not finished."""

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from opd_lightning.config.labels import AXES, swept
from opd_lightning.reporting.runs import with_label

log = logging.getLogger(__name__)


class Overview(Callback):
    """Records the folder of the sweep that this process launches, with any launcher."""

    folder: Path | None = None
    refused: ClassVar[list[str]] = []  # cells without a folder

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, before the first cell."""
        Overview.folder, Overview.refused = Path(config.hydra.sweep.dir), []
        os.environ[AXES] = swept(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, after the last cell."""
        os.environ.pop(AXES, None)


def overview(folder: Path) -> str:
    """The number of cells in each state, and a sentence for each unfinished one."""
    statuses = {path.parent: state(path) for path in sorted(folder.glob("*/seed-*/status.json"))}
    states = Counter(status["state"] for status in statuses.values())
    states.update(["refused"] * len(Overview.refused))
    lines = [f"{folder}: " + (", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "no cell was begun")]
    for cell, status in statuses.items():
        if status["state"] != "finished":
            reason = f": {status['reason']}" if "reason" in status else ""
            lines.append(f"  {with_label(cell.relative_to(folder), status)} is {status['state']}{reason}")
    lines += [f"  {sentence}" for sentence in Overview.refused]
    if len(lines) > 1:
        lines.append("the same command makes what is missing and leaves what is finished alone")
    return "\n".join(lines)


def state(path: Path) -> dict[str, Any]:
    """The content of a status.json; the state is "unreadable" where it cannot be read."""
    try:
        status = json.loads(path.read_text())
        return status if "state" in status else {"state": "unreadable"}
    except (OSError, ValueError, TypeError):
        return {"state": "unreadable"}
