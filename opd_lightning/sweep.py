"""After a sweep: which cells are there, which are not, and why."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class Overview(Callback):
    """Remembers the folder of the sweep that this process launches, whatever launcher makes its cells."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, before the first cell."""
        Overview.folder = Path(config.hydra.sweep.dir)


def overview(folder: Path) -> str:
    """How many cells are in which state, and a sentence for each that is not finished."""
    told = {path.parent: json.loads(path.read_text()) for path in sorted(folder.glob("*/seed-*/status.json"))}
    states = Counter(status["state"] for status in told.values())
    lines = [f"{folder}: " + (", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "no cell was begun")]
    for cell, status in told.items():
        if status["state"] != "finished":
            reason = f": {status['reason']}" if "reason" in status else ""
            lines.append(f"  {cell.relative_to(folder)} is {status['state']}{reason}")
    if len(lines) > 1:
        lines.append("the same command makes what is missing and leaves what is finished alone")
    return "\n".join(lines)
