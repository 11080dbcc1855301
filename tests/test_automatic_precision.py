"""trainer.precision=auto: what it becomes, that a run keeps it, and that the first step can take it back to float32."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from opd_lightning import Distillation
from opd_lightning.check import examine
from opd_lightning.config import compose
from opd_lightning.config.precision import AUTO, EXACT, MIXED, with_precision
from opd_lightning.preflight import automatic_precision, narrow
from opd_lightning.preflight.automatic_precision import precision_of
from opd_lightning.runs.identity import folder_of, run_folder
from opd_lightning.runs.status import read_status
from opd_lightning.training import first_step
from opd_lightning.training import run as module
from opd_lightning.training.run import run

QUICK = ("evaluation=none", "callbacks.diagnostics=null", "callbacks.samples=null")


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which `auto` finds bfloat16; the runs stay on the CPU."""
    monkeypatch.setattr(automatic_precision, "takes_gpu", lambda cfg: True)
    monkeypatch.setattr(automatic_precision, "has_bfloat16", lambda device: True)


@pytest.mark.parametrize(
    ("there", "has", "words", "expected"),
    [
        (True, True, [], MIXED),
        (True, True, ["trainer.accelerator=gpu", "trainer=fsdp2"], MIXED),
        (True, True, ["adapter=lora"], MIXED),
        (True, False, [], EXACT),
        (False, True, [], EXACT),
        (True, True, ["trainer.accelerator=cpu"], EXACT),
        (True, True, ["model.dtype=float64"], EXACT),
        (True, True, ["model.dtype=bfloat16", "adapter=lora"], EXACT),
        (True, True, ["trainer.precision=32-true"], EXACT),
    ],
)
def test_auto_follows_accelerator_hardware_and_dtype(monkeypatch, tmp_path, there, has, words, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(automatic_precision, "has_bfloat16", lambda device: has)
    choice = precision_of(compose(words), tmp_path)
    assert (choice.precision, choice.tentative) == (expected, expected == MIXED)
    assert bool(choice.reason) == ("precision" not in str(words))


def test_a_teacher_follows_what_auto_becomes():
    cfg = compose(["method=opd", "trainer=ddp"])
    assert (cfg.trainer.precision, cfg.teacher.dtype) == (AUTO, "float32")  # what commands without a Trainer read
    assert with_precision(cfg, MIXED).teacher.dtype == "bfloat16"


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def recorded(folder):
    """What status.json and config.yaml say."""
    return read_status(folder)["precision"], yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"]


def test_a_first_step_that_differs_trains_in_float32_as_if_it_had_been_set(small, gpu, monkeypatch, caplog):
    """The weights are equal bit by bit, nothing is left of the beginning, and the run goes on so."""
    monkeypatch.setattr(narrow, "BOUND", 0.0)
    caplog.set_level(logging.WARNING, "opd_lightning")
    words = ("method=sft", *QUICK, "trainer.max_steps=1")
    fallen, exact = run(small(*words)), run(small(*words, "trainer.precision=32-true"))
    (told,) = [r.getMessage() for r in caplog.records if "bfloat16" in r.getMessage()]
    assert "change the loss on prompts by" in told and "a KL of" in told and "goes on in float32" in told
    one, two = state(fallen), state(exact)
    assert fallen != exact and all(torch.equal(one[name], two[name]) for name in two)
    assert recorded(fallen) == recorded(exact) == (EXACT, EXACT)
    assert len(set(len((folder / "metrics.csv").read_text().splitlines()) for folder in (fallen, exact))) == 1
    assert precision_of(small(*words), fallen) == (EXACT, "the run began with it", False)


def test_a_run_keeps_its_precision_on_another_machine(small, gpu, monkeypatch):
    compared = []
    monkeypatch.setattr(first_step, "differences", lambda student, texts: compared.append(len(texts)) or (0.0, 0.0))
    folder = run(small("method=sft", *QUICK, "trainer.max_steps=1"))
    assert recorded(folder) == (MIXED, MIXED) and compared == [4]
    monkeypatch.setattr(automatic_precision, "takes_gpu", lambda cfg: False)
    assert run(small("method=sft", *QUICK, "trainer.max_steps=2")) == folder
    assert recorded(folder) == (MIXED, MIXED) and compared == [4] and read_status(folder)["step"] == 2


SCRIPT = """
import sys
from opd_lightning.config import compose
from opd_lightning.preflight import automatic_precision, narrow
from opd_lightning.training.run import run

automatic_precision.takes_gpu = automatic_precision.has_bfloat16 = lambda _: True
narrow.BOUND = 0.0
run(compose(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_all_devices_go_on_in_float32_together(tiny, other, tmp_path, trainer):
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {"model.path": tiny, "model.teacher": other, "output_dir": tmp_path, "trainer": trainer, "trainer.devices": 2}
    given |= {"trainer.accelerator": "cpu", "trainer.max_steps": 2, "data.batch_size": 4, "task.n_train": 16, "logger": "none"}
    words = [*(f"{key}={value}" for key, value in given.items()), "method=opd", "evaluation=none"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for more in (["study.name=auto"], ["study.name=set", "trainer.precision=32-true"]):
        command = [sys.executable, str(tmp_path / "script.py"), *words, *more]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-1500:]
    one, two = (state(next(tmp_path.glob(f"{name}/*/seed-0"))) for name in ("auto", "set"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("precision", [EXACT, MIXED])
def test_a_precision_that_was_set_is_not_compared(small, gpu, monkeypatch, tmp_path, precision):
    monkeypatch.setattr(module, "fit_in", lambda *given: given)
    cfg = small(f"trainer.precision={precision}")
    assert module.fit(cfg, tmp_path) == (precision, cfg, tmp_path, None, [])
    assert module.fit(small(), tmp_path)[0] == MIXED


def test_a_run_from_before_auto_is_found_again(small, gpu):
    """Its default was 32-true, and its status.json says nothing of it; one that set 32-true later is another run."""
    cfg, exact = small(*QUICK), small(*QUICK, "trainer.precision=32-true")
    folder = folder_of(exact)
    assert run_folder(cfg) == folder_of(cfg) != folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("trainer: {precision: 32-true}\ngenerator: {}\n")
    (folder / "status.json").write_text(json.dumps({"state": "interrupted"}))
    assert run_folder(cfg) == folder and precision_of(cfg, folder).precision == EXACT
    automatic_precision.record(folder, EXACT)
    assert run_folder(cfg) == folder
    shutil.rmtree(folder)
    folder.mkdir()
    automatic_precision.record(folder, EXACT)
    (folder / "config.yaml").write_text("trainer: {precision: 32-true}\ngenerator: {}\n")
    assert run_folder(cfg) != folder == run_folder(exact)


def test_check_says_what_auto_is_here(small, gpu, monkeypatch):
    cfg = small(*QUICK)
    (line,) = [result.text for result in examine(cfg, fast=True) if result.name == "trainer"]
    assert "precision bf16-mixed (auto: this GPU has bfloat16" in line
    monkeypatch.setattr(automatic_precision, "takes_gpu", lambda cfg: False)
    (line,) = [result.text for result in examine(cfg, fast=True) if result.name == "trainer"]
    assert "precision 32-true (auto: on a CPU" in line


def test_what_is_no_number_does_not_agree():
    assert narrow.agree(0.02, 0.0) and not narrow.agree(0.021, 0.0) and not narrow.agree(0.0, float("nan"))


def test_in_python_auto_is_float32(gpu, tiny):
    """The Trainer is the user's, whose precision is not known when the teacher is loaded."""
    made = Distillation("sft", tiny, overrides=["task=world", "task.n_train=16", "task.n_eval=4", "evaluation=none"])
    assert made.cfg.trainer.precision == EXACT == made.trainer(max_steps=1, accelerator="cpu").precision
