"""Loggers, and numbers of the evaluation for Lightning's callbacks and Hydra's sweepers."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from opd_lightning.callbacks import Checkpoint
from opd_lightning.callbacks.evaluation import check_monitors, publish
from opd_lightning.config import compose, first_stage
from opd_lightning.preflight.logger import check_logger
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.loggers import without_anonymous
from opd_lightning.training.result import Result, result, result_names
from opd_lightning.training.run import run

SHORT = ("method=sft", "evaluation.every=1", "evaluation.answers=null", "callbacks.samples.every=1", "task.n_eval=2")
STOPPING = ("callbacks=early_stopping", "callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=1000")


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def longer(small, *words: str) -> Path:
    """A run of two updates, and then of three in the same folder."""
    first, second = run(small(*SHORT, *words)), run(small(*SHORT, *words, "trainer.max_steps=3"))
    assert first == second
    return second


@pytest.mark.parametrize("option", ["none", "csv"])
def test_metrics_csv_alone(option):
    assert compose([f"logger={option}"]).logger is None


def test_wandb_is_given_no_unset_argument_of_which_it_warns(tmp_path):
    made = [WandbLogger(save_dir=str(tmp_path), offline=True, anonymous=value) for value in (None, True)]
    assert ["anonymous" in without_anonymous(logger)._wandb_init for logger in made] == [False, True]
    assert without_anonymous(None) is None


@pytest.mark.slow
def test_wandb_has_conversations_in_its_table(small):
    """Offline, in the files that are sent: each row is a conversation with its writers, and the verdict on it."""
    played = ("method=grpo", "environment=calculator", "rollout.sampling.max_new_tokens=24", "callbacks.samples.every=1")
    folder = run(small(*played, "callbacks.samples.n=16", "logger=wandb", "evaluation=none", "trainer.max_steps=3"))
    tables = [json.loads(f.read_text()) for f in folder.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")]
    kept = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(tables) == 3 and all(table["columns"] == list(kept[0]) for table in tables)
    assert sorted(map(str, (row for t in tables for row in t["data"]))) == sorted(str(list(row.values())) for row in kept)
    texts = [row["completion"] for row in kept]
    assert any(text.startswith("student: ") and "\nenvironment: " in text for text in texts)


def test_tensorboard_has_every_number_once_and_the_configuration(small):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = longer(small, "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    for name in ("train/loss", "eval/new/accuracy"):
        expected = [(row["step"], row[name]) for row in read_csv(folder / "metrics.csv") if name in row]
        logged = events.Scalars(name)
        assert [e.step for e in logged] == [step for step, _ in expected]
        assert [e.value for e in logged] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert "samples/text_summary" in events.Tags()["tensors"]
    assert yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text())["optim"]["lr"] == 2e-4


def test_tensorboard_hides_what_came_after_the_restored_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from opd_lightning.training.loggers import TensorBoard

    first = TensorBoard(str(tmp_path))
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step)}, step)
    first.finalize("failed")
    again = TensorBoard(str(tmp_path))
    again.drop_after(1)
    again.log_metrics({"train/loss": 20.0}, 2)
    again.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.slow  # making MLflow's database takes seconds
def test_a_resumed_run_goes_on_in_its_run_of_mlflow(small, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = longer(small, "logger=mlflow", "study.name=mine")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "sft, seed 0" and found.info.status == "FINISHED"
    assert {"study": "mine", "method": "sft"}.items() <= found.data.tags.items()
    assert found.data.tags["run"] == "-".join(folder.parts[-3:])
    assert found.data.params["optim.lr"] == "0.0002" and found.data.params["trainer.max_steps"] == "2"
    history = client.get_metric_history(found.info.run_id, "eval/new/accuracy")
    assert Counter(m.step for m in history) == {0: 1, 1: 1, 2: 1, 3: 1}
    with pytest.raises(ValueError, match="nothing would ever be learned"):
        run(small(*SHORT, "logger=mlflow", "study.name=mine", "loss.weight._target_=tests.test_loggers.nothing", "seed=1"))
    states = {r.info.run_name: r.info.status for r in client.search_runs([experiment.experiment_id])}
    assert states == {"sft, seed 0": "FINISHED", "sft, seed 1": "FAILED"}


def nothing(tokens):
    """A weight that leaves no token."""
    return torch.zeros_like(tokens.weight)


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow")])
def test_a_logger_that_is_not_installed_is_a_sentence(small, monkeypatch, option, package):
    monkeypatch.setattr("opd_lightning.preflight.logger.find_spec", lambda name: None if name == package else name)
    with pytest.raises(ValueError, match=rf"{package} is not installed; pip install 'opd-lightning\[{package}\]'"):
        check_logger(small(f"logger={option}"))
    check_logger(small())


@pytest.mark.slow
def test_a_first_stage_has_the_logger_of_its_run(small):
    cfg = small("init_from_run=[method=sft]", "study.name=mine", "logger=mlflow")
    assert first_stage(cfg).logger.experiment_name == "mine.stages"
    cfg.logger = None
    assert first_stage(cfg).logger is None


@pytest.mark.slow
def test_early_stopping_by_yaml_ends_a_run_that_is_then_finished(small):
    words = (*SHORT, *STOPPING, "trainer.max_steps=50", "callbacks.early_stopping.monitor=eval/new/accuracy")
    folder = run(small(*words))
    assert (status(folder)["step"], status(folder)["ended_by"]) == (3, "callbacks.EarlyStopping")
    before = (folder / "metrics.csv").read_text()
    assert run(small(*words)) == folder and (folder / "metrics.csv").read_text() == before
    run(small(*SHORT, "trainer.max_steps=5"))  # without the callback the run goes on
    assert (status(folder)["step"], status(folder)["ended_by"]) == (5, "trainer.max_steps")


@pytest.mark.slow
def test_an_interrupted_run_stops_early_where_an_uninterrupted_one_does(small, monkeypatch):
    words = (*SHORT, *STOPPING, "trainer.max_steps=50", "callbacks.early_stopping.patience=3", "callbacks.checkpoint.every=1")
    words = tuple(dict((w.split("=")[0], w) for w in words).values())
    after = Checkpoint.on_train_batch_end

    def interrupt(self, trainer, module, *rest):
        if trainer.global_step == 2:
            self.stop_signal = 2
        after(self, trainer, module, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "on_train_batch_end", interrupt)
        run(small(*words))
    assert status(run(small(*words)))["step"] == 4  # one evaluation sets the best value, three more are no better


@pytest.mark.slow
def test_lightnings_model_checkpoint_keeps_the_best(small):
    best = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: eval/new/length, mode: min}"
    folder = run(small(*SHORT, f"+callbacks.best={best}"))
    rows = [(row["eval/new/length"], row["step"]) for row in read_csv(folder / "metrics.csv") if row["step"]]
    (kept,) = (folder / "best").iterdir()
    assert kept.name == f"epoch=0-step={min(rows)[1]}.ckpt"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt"}


def trainer_with(numbers: list[str], *callbacks: L.Callback) -> Any:
    """A trainer as far as checks of names read it."""
    return SimpleNamespace(callback_metrics={f"eval/{name}": torch.tensor(0.0) for name in numbers}, callbacks=callbacks)


def test_a_number_that_is_not_measured_is_refused_after_the_first_evaluation():
    trainer = trainer_with(["new/accuracy"], EarlyStopping("eval/old/accuracy"), EarlyStopping("train/loss"))
    with pytest.raises(ValueError, match="monitor=eval/old/accuracy of EarlyStopping is no number of this evaluation"):
        check_monitors(trainer)
    with pytest.raises(ValueError, match="optimize=eval/old is not logged by this run, which has eval/new/accuracy"):
        Result(["eval/old"]).on_train_start(trainer, None)
    check_monitors(trainer_with(["new/accuracy"], EarlyStopping("eval/new/accuracy")))


def test_an_evaluation_takes_the_place_of_the_one_before():
    trainer = trainer_with(["old"])
    publish(trainer, {"step": 3, "new": 0.5})
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == {"eval/new": 0.5}


def test_a_run_returns_the_last_value_of_what_is_optimized(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,eval/new,train/loss\n0,0.25,\n1,,2.0\n2,0.75,\n3,,1.5\n")
    for given, expected in ((None, None), ("eval/new", 0.75), (["eval/new", "train/loss"], (0.75, 1.5))):
        assert result(OmegaConf.create({"optimize": given}), tmp_path) == expected
    with pytest.raises(ValueError, match="optimize=train/reward is not logged by this run, which has train/loss"):
        result(OmegaConf.create({"optimize": "train/reward"}), tmp_path)
    with pytest.raises(ValueError, match="optimize='accuracy' is no logged number"):
        result_names(OmegaConf.create({"optimize": "accuracy"}))


@pytest.mark.slow
def test_optuna_searches_a_learning_rate(tiny, other, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["-m", "method=sft", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize"]
    words += ["hydra.sweeper.sampler.seed=0", "optim.lr=tag(log,interval(1e-5,1e-1))", "optimize=train/loss"]
    words += [f"model.path={tiny}", f"model.teacher={other}", f"output_dir={tmp_path}", "study.name=search", "logger=none"]
    words += ["trainer.max_steps=3", "task.n_train=16", "task.n_eval=8", "data.batch_size=4", "evaluation=none"]
    words += ["optim.warmup_steps=0", "trainer.accelerator=cpu"]
    for _ in range(2):  # the second time every run is found again
        done = subprocess.run([sys.executable, "-m", "opd_lightning", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
        runs = {
            OmegaConf.load(path.parent / "config.yaml").optim.lr: read_csv(path)[-1]["train/loss"]
            for path in (tmp_path / "search").glob("*/seed-0/metrics.csv")
        }
        assert len(runs) == 3 and found["best_value"] == min(runs.values())
        assert runs[found["best_params"]["optim.lr"]] == min(runs.values())
    assert done.stdout.count("finished before") == 3
