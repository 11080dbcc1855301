"""Samples: shows completions and verdicts during training on the screen, in samples.jsonl, and as a logger's table."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import rich
from rich.markup import escape

from opd_lightning.callbacks.diagnostics import text_of
from opd_lightning.rollout.conversation_text import conversation_text
from opd_lightning.types import Verdict
from opd_lightning.utils.atomic_files import read_lines, replace_text


class Samples(L.Callback):
    """Records a few completions at regular steps.

    Args:
        every: optimizer steps between samples.
        n: completions to keep each time; the first is shown.
    """

    def __init__(self, every: int = 25, n: int = 4):
        if every < 1 or n < 1:
            raise ValueError(f"callbacks.samples.every={every} and callbacks.samples.n={n} must be at least 1.")
        self.every, self.n, self.last = every, n, -every

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Drop samples beyond the restored checkpoint."""
        path = Path(trainer.default_root_dir) / "samples.jsonl"
        if trainer.is_global_zero and path.is_file():
            rows = [row for row in read_lines(path) if row["step"] <= trainer.global_step]
            replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self.last = rows[-1]["step"] if rows else -self.every

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: object) -> None:
        """Write the first samples of the step's rollout."""
        if trainer.global_step - self.last < self.every or not trainer.is_global_zero:
            return
        self.last = trainer.global_step
        samples = outputs["samples"][: self.n]
        texts = [conversation_text(module.renderer, sample) for sample in samples]
        if module.scoring.verify is not None:  # also where the loss reads no verdicts
            samples = module.scoring.judge(samples)
        rows = [
            {
                "step": trainer.global_step,
                "prompt": text_of(sample.example.messages[-1]),
                "completion": text,
                "writer": sample.source,
                "reward": None if sample.verdict is None else sample.verdict.content,
                "verdict": None if sample.verdict is None else described(sample.verdict),
                "feedback": None if sample.verdict is None else sample.verdict.feedback,
            }
            for sample, text in zip(samples, texts, strict=True)
        ]
        with (Path(trainer.default_root_dir) / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        first = rows[0]
        line = f"{first['prompt']} -> {first['completion']}".replace("\n", " ")
        rich.get_console().print(
            f"  [dim]step {trainer.global_step}, {first['writer']}:[/] {escape(line[:160])}"
            + (f" [dim]({escape(first['verdict'])})[/]" if first["verdict"] else ""),
            highlight=False,
        )
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("samples", list(first), [list(row.values()) for row in rows], step=trainer.global_step)


def described(verdict: Verdict) -> str:
    """A verdict in words: right, wrong or partly right, and whether it has the format."""
    content = "right" if verdict.content >= 1 else "wrong" if verdict.content <= 0 else "partly right"
    kept = "" if verdict.format is None else ", in the format" if verdict.format >= 1 else ", not in the format"
    return content + kept
