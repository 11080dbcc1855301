"""MetricsFile: metrics.csv, one row per step, with any other logger, and no step twice after an interruption."""

import csv
import io
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from opd_lightning.utils.atomic_files import replace_text

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """Appends to a CSV file; a metric that appears later adds a column.

    Args:
        path: of the file; rows of an earlier part of the run stay.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.rows = read_csv(path)
        self.written, self.last = len(self.rows), [dict(row) for row in self.rows[-1:]]
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to a step's row."""
        metrics = {k: v for k, v in metrics.items() if k not in ("epoch", "step")}
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1] |= metrics

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def save(self) -> None:
        """Append new steps, or rewrite the file if a column or a written step has changed."""
        columns = list(dict.fromkeys([*self.columns, *(k for row in self.rows[max(0, self.written - 1) :] for k in row)]))
        if columns != self.columns or self.rows[: self.written][-1:] != self.last:
            self.columns = columns
            self._rewrite()
        elif len(self.rows) > self.written:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerows(self.rows[self.written :])
        self.written, self.last = len(self.rows), [dict(row) for row in self.rows[-1:]]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Drop rows beyond a step, that of the restored checkpoint; -1 drops all."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        if self.path.exists():
            self._rewrite()
        self.written, self.last = len(self.rows), [dict(row) for row in self.rows[-1:]]

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        replace_text(self.path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file as numbers; empty cells and incomplete rows (after a crash) are left out."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")
    header, *lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
    rows, torn = [], int(not text.endswith("\n"))
    for line in lines:
        try:
            row = {k: int(v) if k == "step" else float(v) for k, v in zip(header, line, strict=True) if v != ""}
            rows.append({"step": row["step"]} | row)
        except (ValueError, KeyError):
            torn += 1
    if torn:
        log.warning(f"warning: {torn} torn rows of {path} are left out.")
    return rows
