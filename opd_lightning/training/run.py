"""Training of one run: from a composed configuration to a run folder."""

import gc
import json
import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from opd_lightning.callbacks import Checkpoint, CostLedger, Evaluation
from opd_lightning.callbacks.checkpoint import check_checkpoint
from opd_lightning.callbacks.evaluation import interrupted
from opd_lightning.config import build, first_stage, plain
from opd_lightning.config.compatibility import check
from opd_lightning.config.labels import run_label
from opd_lightning.config.limits import limited
from opd_lightning.config.precision import EXACT, with_precision
from opd_lightning.config.schema import leaves
from opd_lightning.config.trainer_arguments import processes_of
from opd_lightning.preflight.automatic_precision import precision_of, record
from opd_lightning.preflight.components import Components, assemble
from opd_lightning.preflight.devices import check_started, devices
from opd_lightning.preflight.logger import check_logger
from opd_lightning.preflight.results import raise_on_failures
from opd_lightning.preflight.token_budget import with_token_budget
from opd_lightning.reporting.results import Results
from opd_lightning.runs.identity import run_folder
from opd_lightning.runs.status import horizon, is_finished, is_worker, read_status, say, steps_of, write_status
from opd_lightning.training.endings import Stopped, stopped, stopper
from opd_lightning.training.first_step import BFloat16Differs, FirstStep
from opd_lightning.training.loggers import close_loggers, loggers
from opd_lightning.training.parts import checked, data_of, module_of, warn_of_near_duplicates
from opd_lightning.training.result import Result, result_names
from opd_lightning.utils import errors, freed_memory
from opd_lightning.utils.atomic_files import locked, replace_text
from opd_lightning.utils.secrets import redact_secrets
from opd_lightning.utils.seeds import derive_seed

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Path:
    """Make the run that `cfg` describes, or resume it; a finished one is left as it is.

    Returns:
        The run's folder.

    Raises:
        ValueError: something is wrong with the configuration, the data or the models; status.json has the reason.
        KeyboardInterrupt: the run was stopped; the same command resumes it.
    """
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"run takes the configuration that compose makes, not a {type(cfg).__name__}: run(compose([...])).")
    for warning in check(cfg):
        log.warning(f"warning: {warning}")
    check_logger(cfg)
    result_names(cfg)
    check_started(cfg)
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
    with nullcontext() if is_worker() else locked(folder):
        return make(cfg, folder)


def other_evaluation(cfg: DictConfig, folder: Path) -> Iterator[str]:
    """A warning if a finished run was measured with other evaluations, which do not make another run."""
    if not (folder / "config.yaml").is_file():
        return
    recorded: Any = plain(OmegaConf.load(folder / "config.yaml"))  # type: ignore[arg-type]
    before, now = (dict(leaves(tree["evaluation"])) for tree in (recorded, redact_secrets(plain(cfg))))
    if other := [key for key in {**before, **now} if before.get(key) != now.get(key) and not follows_data(key, now)]:
        first, more = other[0], f", and {len(other) - 1} more" if len(other) > 1 else ""
        yield (
            f"this run was measured with evaluation.{first}={before.get(first)}, not {now.get(first)}{more}, and is not "
            f"measured again; python -m opd_lightning.evaluate run={folder} measures its end, another study.name makes it "
            "again with these evaluations."
        )


def follows_data(key: str, now: Mapping[str, Any]) -> bool:
    """Whether a recorded evaluation key is null in the configuration, and follows the data."""
    return key.endswith("max_new_tokens") and now.get(key, 0) is None


def make(cfg: DictConfig, folder: Path) -> Path:
    """Train, and write to status.json how it ended; see `run`."""
    try:
        start = None if cfg.init_from_run is None else run_first_stage(cfg)
        trainer = fit(cfg, folder, start)
    except KeyboardInterrupt:
        write_status(folder, "interrupted", reason="stopped by the user or a signal")
        raise
    except Exception as error:
        message = errors.explain(error)
        with suppress(OSError):  # the disk may be what failed
            write_status(folder, "failed", label=run_label(cfg), reason=message or f"{type(error).__name__}: {error}")
        if message is not None and not isinstance(error, ValueError):
            raise ValueError(message) from error
        raise
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    budget = next((limit for c in callbacks if (limit := getattr(c, "reached", None))), None)
    stop_signal = next((n for c in callbacks if (n := getattr(c, "stop_signal", None)) is not None), None)
    if interrupted(trainer) and trainer.global_step != trainer.max_steps:
        write_status(folder, "interrupted", step=trainer.global_step, reason="stopped by the user or a signal")
        raise Stopped(f"interrupted at step {trainer.global_step}; the same command goes on: {folder}", stop_signal)
    ended_by = budget or stopper(trainer) or "trainer.max_steps"
    write_status(folder, "finished", step=trainer.global_step, ended_by=ended_by)
    if ended_by != "trainer.max_steps":
        log.info(f"ended at update {trainer.global_step} by {ended_by}")
    if not is_worker():
        show(folder)
    if stop_signal is not None:  # it came during the last evaluation: a sweep ends here
        raise Stopped(f"stopped, after finishing {folder}", stop_signal)
    return folder


def fit(cfg: DictConfig, folder: Path, start: Path | None = None) -> L.Trainer:
    """Train in the run's precision, or in float32 from its start where the first step does not confirm bfloat16.

    Args:
        start: the run whose result is the start model; None takes `model.path`.
    """
    quiet()
    choice = precision_of(cfg, folder)
    if choice.tentative:
        say(f"trainer.precision={choice.precision}: {choice.reason}")
    try:
        return fit_in(choice.precision, cfg, folder, start, [FirstStep()] if choice.tentative else [])
    except BFloat16Differs as difference:
        reason = str(difference)
    release_memory()  # outside of the handler, where nothing holds the models any more
    if not is_worker():
        log.warning(f"warning: {reason}; the run goes on in float32; trainer.precision=bf16-mixed takes bfloat16 all the same")
    return fit_in(EXACT, cfg, folder, start, [])


def fit_in(precision: str, cfg: DictConfig, folder: Path, start: Path | None, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Instantiate the components and train; `callbacks` stand before all others."""
    record(folder, precision)
    cfg = with_precision(cfg, precision)
    cfg = cfg if start is None else starting_from(cfg, start)
    say("reading the data, and rendering its prompts ...")
    parts = assemble(cfg, folder)
    with closing(parts.generator):
        return train(parts, cfg, folder, callbacks)


def release_memory() -> None:
    """Give back the memory of models that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(parts: Components, cfg: DictConfig, folder: Path, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Check the components, and train."""
    cfg = limited(cfg, parts.task.max_new_tokens)
    about = {"label": run_label(cfg), "start_model": parts.model.lineage(), "started": str(parts.renderer.template.today)}
    write_status(folder, "running", **about)
    for warning in raise_on_failures(devices(cfg)):
        log.warning(f"warning: {warning}")
    notes = checked(parts, cfg)
    cfg = with_token_budget(parts, cfg, folder)
    cfg = parts.bounded(cfg)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    before = read_status(folder).get("data", notes)
    if checkpoint.exists() and before["digest"] != notes["digest"]:
        raise ValueError(
            f"task has other training examples than those that the run in {folder} began with; bring them back, or choose "
            "another study.name."
        )
    if checkpoint.exists():
        check_checkpoint(checkpoint)
    write_status(folder, "running", data=notes)
    warn_of_near_duplicates(notes)
    # Weights that a method may add (adapters, say) are drawn here; prompts and samples derive their own seeds.
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    module, data = module_of(parts, cfg), data_of(parts, cfg)
    # The evaluation comes first and the checkpoint last, so that the checkpoint holds the evaluation's history.
    answers = build(
        cfg.evaluation.get("answers"), task=parts.task, tokenizer=parts.tokenizer, renderer=parts.renderer, folder=folder
    )
    fixed = [Evaluation(parts.suite, cfg.evaluation.every, folder, answers), CostLedger(folder), build(cfg.budget)]
    nodes = [node for node in cfg.callbacks.values() if node is not None]  # null switches one off
    chosen = [build(node, dirpath=str(folder / "best")) for node in nodes]
    chosen.sort(key=lambda callback: isinstance(callback, Checkpoint))
    # Lightning refuses its own ModelCheckpoint without this, and adds one with this.
    settings = {**cfg.trainer, "enable_checkpointing": any(isinstance(c, LightningCheckpoint) for c in chosen)}
    trainer: L.Trainer = build(
        OmegaConf.create({"trainer": settings}).trainer,  # for the place in errors
        logger=loggers(cfg, folder),
        callbacks=[*callbacks, *fixed, Result(result_names(cfg)), *chosen],
        default_root_dir=str(folder),
    )
    if not is_worker():
        replace_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(redact_secrets(plain(cfg)))))
    say(f"{run_label(cfg)} -> {folder}" + (" (going on)" if checkpoint.exists() else ""))
    first = bool(parts.suite) and not checkpoint.exists()
    say("loading the weights" + ("; an evaluation comes before the first update ..." if first else " ..."))
    try:
        trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than tensors and plain values, so another program made it; remove it, or choose another "
            "study.name."
        ) from error
    except SystemExit as stop:  # Lightning raises it at a KeyboardInterrupt
        raise stopped(trainer, folder) from stop
    finally:
        module.rollouts.close()
        freed_memory.give_back()
        close_loggers(trainer)
        for callback in chosen:
            if isinstance(callback, Checkpoint):
                callback.restore_handlers()
    return trainer


def run_first_stage(cfg: DictConfig) -> Path:
    """Make or find the run whose result is this run's start model; returns its folder.

    Raises:
        ValueError: it does not exist and the run has several devices or nodes: several devices make one run per command.
    """
    stage = first_stage(cfg)
    if processes_of(cfg.trainer) != 1 and not is_finished(folder := run_folder(stage), horizon(stage, folder)):
        command = " ".join([*cfg.init_from_run, f"seed={stage.seed}", f"study.name={stage.study.name}"])
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} trainer.num_nodes={cfg.trainer.num_nodes} cannot make two runs in one "
            f"command; make the first stage by itself: python -m opd_lightning {command}"
        )
    return run(stage)


def starting_from(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration with the start model taken from another run's folder."""
    cfg = OmegaConf.create(plain(cfg))  # resolve what depends on model.stand_in before it changes
    cfg.model.path, cfg.model.stand_in = str(folder), False
    return cfg


def show(folder: Path) -> None:
    """The run's evaluation before and after, as a table; without the validation split and single skills."""
    record = json.loads((folder / "evaluation.json").read_text())
    title = read_status(folder).get("label", folder.parent.name)
    Console().print(Results(title, record["history"], record["intervals"]))


def quiet() -> None:
    """Silence messages of other libraries that users cannot act on."""
    disable_progress_bar()
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("lightning.pytorch.utilities.rank_zero", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
    ):
        warnings.filterwarnings("ignore", message)
