"""Progress: a bar with loss, both KLs, tokens per second and time left."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import rich
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(L.Callback):
    """One bar on a terminal or in a notebook; a line every tenth of the run where the output is a file.

    Args:
        refresh_seconds: shortest time between two updates of the bar.
    """

    def __init__(self, refresh_seconds: float = 0.5):
        self.refresh_seconds = refresh_seconds
        self.bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start the bar at the current step."""
        self.begun, self.first = time.perf_counter(), module.ledger.tokens["completion_tokens"]
        self.start = self.printed = trainer.global_step
        if trainer.is_global_zero and (sys.stdout.isatty() or rich.get_console().is_jupyter):
            columns = (
                "{task.description}",
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Bar(*columns, console=rich.get_console(), refresh_per_second=1 / self.refresh_seconds)
            self.bar.start()
            total = trainer.max_steps if trainer.max_steps > 0 else None  # None: a budget ends the run
            self.task = self.bar.add_task("training", total=total, completed=trainer.global_step, note="")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: object) -> None:
        """Update the bar, or print a line."""
        if not trainer.is_global_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, note=self.note(module, outputs["metrics"]))
        elif trainer.global_step - self.printed >= (max(1, trainer.max_steps // 10) if trainer.max_steps > 0 else 10):
            self.printed = trainer.global_step
            pace = (time.perf_counter() - self.begun) / (trainer.global_step - self.start)
            left = pace * (trainer.max_steps - trainer.global_step)
            horizon = (f"/{trainer.max_steps}", f"  {left:.0f} s left") if trainer.max_steps > 0 else ("", "")
            print(f"step {trainer.global_step}{horizon[0]}  {self.note(module, outputs['metrics'])}{horizon[1]}", flush=True)

    def note(self, module: Any, row: Mapping[str, float]) -> str:
        """Loss, KLs, reward and tokens per second of a step as text; a skipped step has no loss."""
        metrics = {k.split("/")[-1]: float(v) for k, v in row.items()}
        rate = (module.ledger.tokens["completion_tokens"] - self.first) / (time.perf_counter() - self.begun)
        names = {"loss": "loss", "forward_kl": "KL fwd", "reverse_kl": "rev", "reward": "reward"}
        shown = [f"{short} {metrics[name]:.3g}" for name, short in names.items() if name in metrics]
        skipped = ["no gradient, skipped"] if metrics.get("skipped") == 1 else []
        return "  ".join([*skipped, *shown, f"{rate:.0f} tokens/s"])

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Stop the bar, and leave it on the screen."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Stop the bar."""
        self.on_train_end(trainer, module)
