"""Evaluation: runs the evaluation suite at the start, on a schedule and at the end of training."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from rich.markup import escape

from opd_lightning.evaluation import GreedyAnswers, leading
from opd_lightning.utils.atomic_files import read_object, replace_text
from opd_lightning.utils.interrupts import Interrupted

log = logging.getLogger(__name__)


class Evaluation(L.Callback):
    """Runs a suite of evaluations and keeps their history, with the costs so far, in evaluation.json.

    One with `ends_only` is run before and after training alone. Scores of single prompts after training are in outcomes.json.
    The numbers are in `trainer.callback_metrics` as `eval/<name>`. Around each evaluation after an update the validation hooks
    of the other callbacks are called, so that Lightning's EarlyStopping and ModelCheckpoint work.

    Args:
        suite: evaluations by name; see `opd_lightning.evaluation`.
        every: optimizer steps between evaluations.
        folder: the run's folder; None writes no files.
        answers: written to answers.json before and after training; None writes none.

    Attributes:
        history: the numbers of each evaluation, with its step.
        texts: the prompts of `answers`, and the answers at "start" and "end".
        stopped_by: the class of the callback that stopped training after an evaluation; None without one.
    """

    def __init__(self, suite: Mapping[str, Any], every: int, folder: Path | None, answers: GreedyAnswers | None = None):
        self.suite, self.every, self.folder, self.answers = suite, every, folder, answers
        self.texts: dict[str, list[str]] = {}
        self.history: list[dict[str, float]] = []
        self.costs: list[dict[str, float]] = []
        self.intervals: dict[str, dict[str, dict[str, float]]] = {}
        self.stopped_by: str | None = None

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Say that validation is not tied to epochs: there is one endless epoch, and callbacks would wait for its end."""
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = self.every

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Evaluate the start model; drop rows beyond a restored checkpoint."""
        self.history = [row for row in self.history if row["step"] <= trainer.global_step]
        self.costs = self.costs[: len(self.history)]
        if self.history and self.measured != self.examples():
            raise ValueError(
                "evaluation.suite differs from the one this run began with, so its numbers could not be compared; go back "
                "to it, or choose another study.name."
            )
        if not self.history:
            self.run(trainer, module, list(self.suite.values()))
            self.say(trainer)
            for warnings in (e.warnings(self.history[0]) for e in self.suite.values() if hasattr(e, "warnings")):
                for warning in warnings:
                    log.warning(f"warning: {warning}")
            self.save_answers(trainer, module, "start")
        publish(trainer, self.history[-1])
        check_monitors(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """Make up for an evaluation that a signal broke off, with the weights that it was of."""
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """Evaluate on schedule."""
        if trainer.global_step // self.every > self.history[-1]["step"] // self.every:
            with suppress(Interrupted):  # the run ends behind this step, and a resumed one makes up for it
                self.validate(trainer, module, self.frequent)
                self.say(trainer)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Evaluate the last step, unless that was just done; an interrupted run is evaluated when it ends."""
        if interrupted(trainer) and trainer.global_step != trainer.max_steps:
            return
        measured = self.history[-1]["step"] == trainer.global_step
        rare = [e for e in self.suite.values() if e not in self.frequent]
        if not measured:
            self.validate(trainer, module, list(self.suite.values()))
        elif rare and trainer.global_step > 0:
            self.run(trainer, module, rare)
        self.save_answers(trainer, module, "end")
        if trainer.is_global_zero and self.folder is not None:
            scores = {name: e.outcomes for name, e in self.suite.items() if getattr(e, "outcomes", None)}
            replace_text(self.folder / "outcomes.json", json.dumps(scores) + "\n")

    @property
    def frequent(self) -> list[Any]:
        """The evaluations without `ends_only`."""
        return [e for e in self.suite.values() if not getattr(e, "ends_only", False)]

    def validate(self, trainer: L.Trainer, module: Any, suite: Sequence[Any]) -> None:
        """Evaluate as Lightning's validation: with the hooks of other callbacks around it."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        for callback in others:
            callback.on_validation_start(trainer, module)
        self.run(trainer, module, suite)
        for callback in others:
            stopping = trainer.should_stop
            callback.on_validation_end(trainer, module)
            if trainer.should_stop and not stopping:
                self.stopped_by = type(callback).__name__

    def run(self, trainer: L.Trainer, module: Any, suite: Sequence[Any]) -> None:
        """Evaluate on every device, so that all stay in step; one writes. Numbers of a step that has a row are added to it."""
        with module.ledger.timing("evaluation"):
            estimates = {k: v for e in suite for k, v in e(module.student, module.teachers, module.generator).items()}
        numbers = {name: estimate.value for name, estimate in estimates.items()}
        bounded = {k: e for k, e in estimates.items() if e.low is not None}
        intervals = {k: {"prompts": e.prompts, "low": e.low, "high": e.high} for k, e in bounded.items()}
        if self.history and self.history[-1]["step"] == trainer.global_step:
            self.history[-1] |= numbers
            intervals = self.intervals["end"] | intervals
        else:
            self.history.append({"step": trainer.global_step, **numbers})
            self.costs.append({"step": trainer.global_step, **module.ledger.so_far()})
        self.intervals = {"start": self.intervals.get("start", intervals), "end": intervals}
        publish(trainer, self.history[-1])
        for logger in trainer.loggers:
            costs = {f"cost/{k}": v for k, v in module.ledger.so_far().items()}
            logger.log_metrics({f"eval/{k}": v for k, v in numbers.items()} | costs, step=trainer.global_step)
            logger.save()
        if trainer.is_global_zero and self.folder is not None:
            record = {"start": self.history[0], "end": self.history[-1], "intervals": self.intervals}
            record |= {"history": self.history, "costs": self.costs, "examples": self.examples()}
            replace_text(self.folder / "evaluation.json", json.dumps(record, indent=1) + "\n")

    def say(self, trainer: L.Trainer) -> None:
        """Print the main numbers of the last evaluation in a line."""
        row = self.history[-1]
        if trainer.is_global_zero and (names := leading(row)):
            numbers = "  ".join(f"{name} {row[name]:.3f}" for name in names)
            rich.get_console().print(f"  [dim]step {row['step']}, evaluation:[/] {escape(numbers)}", highlight=False)

    def save_answers(self, trainer: L.Trainer, module: Any, when: str) -> None:
        """Add the current answers to answers.json, under "start" or "end"."""
        if self.answers is None:
            return
        with module.ledger.timing("evaluation"):
            texts = self.answers(module.generator)
        self.texts = {"prompts": self.answers.prompts} | (self.texts if when == "end" else {}) | {when: texts}
        if trainer.is_global_zero and self.folder is not None:
            path = self.folder / "answers.json"
            earlier = read_object(path) if when == "end" else {}  # a resumed run has the start's answers there
            replace_text(path, json.dumps({"prompts": self.answers.prompts} | earlier | {when: texts}, indent=1) + "\n")
        rows = [[prompt, text] for prompt, text in zip(self.answers.prompts, texts, strict=True)]
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(f"answers/{when}", ["prompt", "answer"], rows, step=trainer.global_step)

    def examples(self) -> dict[str, Any]:
        """The number of examples of each evaluation, and a digest of their ids: only equal ones can be compared."""
        ids = {name: [example.id for example in e.examples] for name, e in self.suite.items()}
        digest = {name: hashlib.blake2b("\n".join(x).encode(), digest_size=8).hexdigest() for name, x in ids.items()}
        return {name: {"n": len(x), "digest": digest[name]} for name, x in ids.items()}

    def state_dict(self) -> dict[str, Any]:
        """The evaluations so far, for the checkpoint."""
        return {"history": self.history, "costs": self.costs, "intervals": self.intervals, "measured": self.examples()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the evaluations from a checkpoint."""
        self.history, self.costs = state["history"], state["costs"]
        self.intervals, self.measured = state["intervals"], state["measured"]


def publish(trainer: L.Trainer, row: Mapping[str, float]) -> None:
    """Put an evaluation's numbers into `trainer.callback_metrics`, in place of those of the one before."""
    metrics = trainer.callback_metrics
    for name in [name for name in metrics if name.startswith("eval/")]:
        del metrics[name]
    metrics.update({f"eval/{name}": torch.tensor(value) for name, value in row.items() if name != "step"})


def check_monitors(trainer: L.Trainer) -> None:
    """Check that the evaluation has every number that a callback monitors.

    Raises:
        ValueError: it lacks one.
    """
    available = [name for name in trainer.callback_metrics if name.startswith("eval/")]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("eval/") and monitor not in available:
            raise ValueError(
                f"monitor={monitor} of {type(callback).__name__} is no number of this evaluation, which has "
                f"{', '.join(available) or 'none'}; choose one of them, or another evaluation=."
            )


def interrupted(trainer: L.Trainer) -> bool:
    """Whether training ends because of a signal, and not because a budget was reached."""
    stopped = any(getattr(callback, "interrupted", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return stopped and not any(getattr(callback, "reached", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
