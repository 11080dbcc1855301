"""OPD-Lightning: does on-policy distillation beat SFT and RL on my task, at what cost, and what does it forget?"""

import importlib
from typing import Any

__version__ = "0.1.0"

PLACES = {
    "Distillation": "opd_lightning.training.distillation",
    "DistillationModule": "opd_lightning.module",
    "Example": "opd_lightning.types",
    "Results": "opd_lightning.reporting.results",
    "Verdict": "opd_lightning.types",
    "compose": "opd_lightning.config.python",
    "run": "opd_lightning.training.run",
}
"""The names for programs in Python, and their modules, which are imported when a name is first used."""

__all__ = ["Distillation", "DistillationModule", "Example", "Results", "Verdict", "compose", "run"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'opd_lightning' has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
