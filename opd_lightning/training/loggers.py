"""Loggers: metrics.csv and the chosen one, and Lightning's loggers with what a resumed run needs."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config import build, plain
from opd_lightning.config.labels import label_of, run_label
from opd_lightning.config.schema import leaves
from opd_lightning.runs.metrics_file import MetricsFile
from opd_lightning.utils.atomic_files import replace_text
from opd_lightning.utils.secrets import redact_secrets


def loggers(cfg: DictConfig, folder: Path) -> list:
    """The metrics.csv logger, and the chosen one."""
    files: list = [MetricsFile(folder / "metrics.csv")]
    if not (folder / "checkpoints" / "last.ckpt").exists():
        files[0].drop_after(-1)  # rows of a run that crashed before its first checkpoint
    if cfg.logger is None:
        return files
    names = {"name": run_label(cfg)[:128], "id": "-".join(folder.parts[-3:]).replace(".", "-")}
    group = {"job_type": label_of(cfg)[:64]} if "job_type" in cfg.logger and cfg.logger.job_type is None else {}
    node = OmegaConf.create({"logger": {**plain(cfg.logger), **group}}).logger  # for the place in errors
    chosen = without_anonymous(build(node, save_dir=str(folder), **names))
    chosen.log_hyperparams(redact_secrets(plain(cfg)))
    return [*files, chosen]


def without_anonymous(logger: Any) -> Any:
    """A logger as it is; Lightning's of W&B without an unset argument `anonymous`, of which wandb warns at each run."""
    arguments = getattr(logger, "_wandb_init", {})
    if arguments.get("anonymous", "") is None:
        del arguments["anonymous"]
    return logger


def close_loggers(trainer: L.Trainer) -> None:
    """Finalize the loggers of a run that has ended, also by an error."""
    try:
        for logger in trainer.loggers:
            logger.finalize("success" if trainer.state.finished else "failed")
    finally:
        finish_wandb()


def finish_wandb() -> None:
    """Close the W&B run, so that the next cell of a sweep opens its own."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    try:
        wandb.finish()
    except OSError:
        with suppress(Exception):  # its service is gone; this avoids a second error at exit
            wandb.teardown()
        raise


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files, in a folder inside the run's folder.

    Args:
        save_dir: the run's folder.
        version: the folder's name.
        options: of Lightning's TensorBoardLogger.
    """

    needs = "tensorboard"

    def __init__(self, save_dir: str, version: str = "tensorboard", **options: Any):
        settings: dict[str, Any] = {"name": "", "version": version, "default_hp_metric": False} | options
        super().__init__(save_dir, **settings)

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Hide points beyond a step, that of the restored checkpoint, by the event that a restarted writer leaves."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self.experiment.file_writer
        writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
        writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        """Log rows as text."""
        rows = [columns, ["---"] * len(columns), *data]
        cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(row)} |" for row in cells), step)


class MLflow(MLFlowLogger):
    """A run of MLflow; a resumed run goes on in it.

    Args:
        save_dir: the run's folder; mlflow_run_id.txt in it names MLflow's run.
        name: the run's name.
        id: a tag of the run: study, cell and seed.
        experiment_name: MLflow's experiment, which groups runs.
        folder: where runs are stored if neither `tracking_uri` nor the variable MLFLOW_TRACKING_URI names a server.
        tracking_uri: of a server or a database.
        tags: further tags.
        options: of Lightning's MLFlowLogger.
    """

    needs = "mlflow"

    def __init__(
        self,
        save_dir: str,
        name: str,
        id: str,
        experiment_name: str = "opd-lightning",
        folder: str = "outputs/mlruns",
        tracking_uri: str | None = None,
        tags: dict[str, str] | None = None,
        **options: Any,
    ):
        self.note = Path(save_dir) / "mlflow_run_id.txt"
        super().__init__(
            experiment_name,
            run_name=name,
            tags={**(tags or {}), "run": id},
            run_id=self.note.read_text().strip() if self.note.is_file() else None,
            **store(tracking_uri, folder) | options,
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add the parameters that MLflow's run lacks, for those it has cannot change; begin the run or go on with it."""
        run = self.experiment.get_run(self.run_id)
        replace_text(self.note, f"{self.run_id}\n")
        self.experiment.update_run(self.run_id, status="RUNNING")
        super().log_hyperparams({key: value for key, value in leaves(params) if key not in run.data.params})

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        """Log rows as a JSON file among the run's artifacts."""
        rows = [dict(zip(columns, row, strict=True)) for row in data]
        self.experiment.log_dict(self.run_id, rows, f"{key}/step-{step}.json")


def store(tracking_uri: str | None, folder: str) -> dict[str, str]:
    """Where MLflow keeps runs and artifacts: at a server or in a database that is named, or else in a folder."""
    if given := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return {"tracking_uri": given}
    place = Path(folder).absolute()
    place.mkdir(parents=True, exist_ok=True)
    return {"tracking_uri": f"sqlite:///{place / 'mlflow.db'}", "artifact_location": (place / "artifacts").as_uri()}
