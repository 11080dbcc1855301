"""One run: from a composed configuration to a folder with everything that is known about it."""

import json
import logging
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from opd_lightning.callbacks import Checkpoint, CostLedger, Evaluation
from opd_lightning.callbacks.checkpoint import check_checkpoint
from opd_lightning.callbacks.evaluation import interrupted
from opd_lightning.config import build, first_stage, plain
from opd_lightning.config.compatibility import check
from opd_lightning.config.schema import leaves
from opd_lightning.data.prompts import PromptData
from opd_lightning.evaluation import Estimate, headlines
from opd_lightning.models.stand_in import NOT_VERIFIED
from opd_lightning.module import DistillationModule
from opd_lightning.preflight.checks import models, settled, updates, verifier
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.resources import memory
from opd_lightning.runs.identity import run_folder
from opd_lightning.runs.metrics_file import MetricsFile
from opd_lightning.runs.status import horizon, is_finished, is_worker, read_status, steps_of, write_status
from opd_lightning.utils import errors
from opd_lightning.utils.atomic_files import alone_in, replace_text
from opd_lightning.utils.secrets import redacted
from opd_lightning.utils.seeds import derive_seed

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Path:
    """Make the run that `cfg` describes, or go on with it where it stopped; a finished one is left alone.

    Returns:
        The run's folder.

    Raises:
        ValueError: something is wrong with the configuration, the data or the models; status.json has the reason.
        KeyboardInterrupt: the run was asked to stop; the same command goes on with it.
    """
    for warning in check(cfg):
        log.warning(f"warning: {warning}")
    folder = run_folder(cfg)
    if is_finished(folder, horizon(cfg, folder)):
        more = 0 < horizon(cfg, folder) < steps_of(folder)
        hint = f" (at {steps_of(folder)} updates; for a shorter run choose another study.name)" if more else ""
        log.info(f"finished before, nothing to do: {folder}{hint}")
        for warning in other_evaluation(cfg, folder):
            log.warning(f"warning: {warning}")
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={cfg.output_dir} cannot be written ({error}); choose another folder.") from error
    with nullcontext() if is_worker() else alone_in(folder):
        return make(cfg, folder)


def other_evaluation(cfg: DictConfig, folder: Path) -> Iterator[str]:
    """Evaluations do not make another run, so a finished one keeps the numbers that were asked for when it was made."""
    if not (folder / "config.yaml").is_file():
        return
    recorded: Any = plain(OmegaConf.load(folder / "config.yaml"))  # type: ignore[arg-type]
    before, now = (dict(leaves(tree["evaluation"])) for tree in (recorded, redacted(plain(cfg))))
    if other := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        first, more = other[0], f", and {len(other) - 1} more" if len(other) > 1 else ""
        yield (
            f"this run was measured with evaluation.{first}={before.get(first)}, not {now.get(first)}{more}, and is not "
            f"measured again; python -m opd_lightning.evaluate run={folder} measures its end, another study.name makes it "
            "again with the evaluations asked for."
        )


def make(cfg: DictConfig, folder: Path) -> Path:
    """Train, and say in status.json how it ended; see `run`."""
    try:
        if cfg.start_from is not None:
            cfg = starting_from(cfg, run_first_stage(cfg))
        trainer = fit(cfg, folder)
    except KeyboardInterrupt:
        write_status(folder, "interrupted", reason="stopped by the user or a signal")
        raise
    except Exception as error:
        told = errors.sentence(error)
        with suppress(OSError):  # the disk may be what failed
            write_status(folder, "failed", reason=told or f"{type(error).__name__}: {error}")
        if told is not None and not isinstance(error, ValueError):
            raise ValueError(told) from error
        raise
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    budget = next((found for c in callbacks if (found := getattr(c, "reached", None))), None)
    asked = next((found for c in callbacks if (found := getattr(c, "asked", None)) is not None), None)
    if interrupted(trainer) and trainer.global_step != trainer.max_steps:
        write_status(folder, "interrupted", step=trainer.global_step, reason="stopped by the user or a signal")
        raise Stopped(f"interrupted at step {trainer.global_step}; the same command goes on: {folder}", asked)
    write_status(folder, "finished", step=trainer.global_step, ended_by=budget or "trainer.max_steps")
    show(folder)
    if asked is not None:  # it came while the finished run was measured: nothing else is begun
        raise Stopped(f"stopped, after finishing {folder}", asked)
    return folder


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved; `code` is the exit status that a shell gives to the signal."""

    def __init__(self, sentence: str, number: int | None):
        super().__init__(sentence)
        self.code = 128 + (number or signal.SIGINT)


def fit(cfg: DictConfig, folder: Path) -> L.Trainer:
    """Instantiate the components and train."""
    quiet()
    parts = assemble(cfg, folder)
    model, task, rollout = parts.model, parts.task, parts.rollout
    write_status(folder, "running", start_model=model.lineage())
    if model.stand_in:
        log.warning(f"warning: {NOT_VERIFIED}")
    found = parts.preflight()
    for warning in settled(chain(models(parts), verifier(parts, 16), memory(parts, cfg), updates(parts, cfg))):
        log.warning(f"warning: {warning}")
    cfg = parts.bounded(cfg)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    before = read_status(folder).get("data", found)
    if checkpoint.exists() and before["digest"] != found["digest"]:
        raise ValueError(
            f"task has other training examples than those that the run in {folder} began with; bring them back, or choose "
            "another study.name."
        )
    if checkpoint.exists():
        check_checkpoint(checkpoint)
    write_status(folder, "running", data=found)
    if found.get("skipped_rows"):
        first = found["skipped_list"][0]
        log.warning(
            f"warning: {found['skipped_rows']} malformed rows are left out, the first: {first}; status.json lists them."
        )
    if found["near_duplicates"]:
        log.warning(
            f"warning: {found['near_duplicates']} of {found['train']} training prompts nearly repeat a held-out one, such as "
            f"{found['near_duplicates_first'][0]}; status.json has more."
        )
    # Weights that a method may add (adapters, say) are drawn here; prompts and samples derive their own seeds.
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    module = DistillationModule(
        model=model,
        renderer=parts.renderer,
        generator=parts.generator,
        rollout=rollout,
        objective=parts.objective,
        teachers=parts.teachers,
        optim=build(cfg.optim),
        seed=cfg.seed,
        verify=task.verify,
        max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
        logits_chunk_size=cfg.logits_chunk_size,
        adapter=build(cfg.adapter),
    )
    data = PromptData(
        parts.examples,
        parts.renderer,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        num_iterations=rollout.num_iterations,
    )
    # The evaluation comes first and the checkpoint last, so that the checkpoint knows the evaluation's history.
    answers = build(cfg.evaluation.get("answers"), task=task, tokenizer=parts.tokenizer, renderer=parts.renderer, folder=folder)
    around = [Evaluation(parts.suite, cfg.evaluation.every, folder, answers), CostLedger(folder), build(cfg.budget)]
    chosen = [build(node) for node in cfg.callbacks.values() if node is not None]  # null switches one off
    chosen.sort(key=lambda callback: isinstance(callback, Checkpoint))
    trainer: L.Trainer = build(
        cfg.trainer, logger=loggers(cfg, folder), callbacks=[*around, *chosen], default_root_dir=str(folder)
    )
    if not is_worker():
        replace_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(redacted(plain(cfg)))))
    log.info(f"{cfg.name}, seed {cfg.seed} -> {folder}" + (" (going on)" if checkpoint.exists() else ""))
    try:
        trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than tensors and plain values, so another program made it; remove it, or choose another "
            "study.name."
        ) from error
    except SystemExit as stop:  # what Lightning makes of a second CTRL-C
        raise KeyboardInterrupt from stop
    finally:
        parts.generator.close()
        try:
            for logger in trainer.loggers:
                logger.finalize("finished")
        finally:
            finish_wandb()
    return trainer


def loggers(cfg: DictConfig, folder: Path) -> list:
    """metrics.csv always, and the chosen logger."""
    files: list = [MetricsFile(folder / "metrics.csv")]
    if not (folder / "checkpoints" / "last.ckpt").exists():
        files[0].drop_after(-1)  # what a run left that died before its first checkpoint
    if cfg.logger is None:
        return files
    names = {"name": f"{cfg.name}-seed-{cfg.seed}", "id": "-".join(folder.parts[-3:]).replace(".", "-")}
    chosen = build(cfg.logger, save_dir=str(folder), **names)
    chosen.log_hyperparams(redacted(plain(cfg)))
    return [*files, chosen]


def finish_wandb() -> None:
    """Close the W&B run, so that the next cell of a sweep opens its own."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    try:
        wandb.finish()
    except OSError:
        with suppress(Exception):  # its service is gone; without this it would complain again at exit
            wandb.teardown()
        raise


def run_first_stage(cfg: DictConfig) -> Path:
    """Make the run that makes this run's start model, or find it; returns its folder.

    Raises:
        ValueError: it is not there and several devices are asked for, whose processes are launched once per command.
    """
    stage = first_stage(cfg)
    if cfg.trainer.devices != 1 and not is_finished(folder := run_folder(stage), horizon(stage, folder)):
        command = " ".join([*cfg.start_from, f"seed={stage.seed}", f"study.name={stage.study.name}"])
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} cannot make two runs in one command; make the first stage by itself: "
            f"python -m opd_lightning {command}"
        )
    return run(stage)


def starting_from(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration with the start model taken from another run's folder."""
    cfg = OmegaConf.create(plain(cfg))  # what hangs on model.stand_in is settled before that changes
    cfg.model.path, cfg.model.stand_in = str(folder), False
    return cfg


def show(folder: Path) -> None:
    """The run's evaluation before and after, as a table; what only chooses, and single skills, stay in evaluation.json."""
    record = json.loads((folder / "evaluation.json").read_text())
    table = Table("evaluation", "start", "end [95 % over prompts]", title=folder.parent.name, title_justify="left")
    for name in headlines(record["end"]):
        value = record["end"][name]
        interval = record["intervals"]["end"].get(name, {})
        before = record["start"].get(name)
        table.add_row(name, "" if before is None else f"{before:.3f}", str(Estimate(value, **interval)))
    Console().print(table)


def quiet() -> None:
    """Silence what a user of this program can do nothing about."""
    disable_progress_bar()
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
    ):
        warnings.filterwarnings("ignore", message)
