"""Names of runs: a cell of a sweep is called by what differs, in the terminal, in files, in reports and in W&B."""

import csv
import json
import re

import pytest
from omegaconf import OmegaConf
from test_report import printed, write_run

from opd_lightning.config.labels import described, distinguished, short_value, short_values, swept
from opd_lightning.reporting.answer import answer
from opd_lightning.reporting.compare import compare
from opd_lightning.reporting.html import write_html
from opd_lightning.reporting.runs import load_study
from opd_lightning.reporting.table import labels, write_csv
from opd_lightning.training.run import loggers


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.5, "0.5"), (3, "3"), (None, "none"), (True, "true"), ({"_target_": "a.b.C"}, "C")],
)
def test_values_are_short(value, text):
    assert short_value(value) == text


def test_paths_are_told_apart_by_their_last_parts():
    assert short_values(["runs/a/start", "runs/b/start"]) == ["a", "b"]
    assert short_values(["x/a/start", "y/a/start", "y/b/start"]) == ["x/a", "y/a", "y/b"]
    assert short_values(["models/facts.jsonl"]) == ["facts.jsonl"]


def test_a_label_has_as_few_settings_as_tell_cells_apart():
    """Alpha follows r, so it is no news; a node of another target is one setting; equal ends get the part before."""
    trees = [{"adapter": {"r": r, "lora_alpha": 2 * r}, "optim": {"lr": lr}} for r in (4, 8) for lr in (1e-4, 1e-3)]
    assert distinguished("sdft", trees) == [f"sdft, r {r}, lr {lr}" for r in (4, 8) for lr in ("1e-4", "1e-3")]
    teachers = [{"teacher": {"_target_": "t.frozen", "a": 1}}, {"teacher": {"_target_": "t.ema"}}, {"teacher": None}]
    assert distinguished("opd", teachers) == ["opd, teacher frozen", "opd, teacher ema", "opd, teacher none"]
    settings = {"loss.temperature": 2.0, "rollout.sampling.temperature": 1.0, "task": "table", "task.path": "a.jsonl"}
    assert described("x", settings) == "x, loss temperature 2, sampling temperature 1, task table, task path a.jsonl"


@pytest.fixture
def rates(tmp_path):
    """SDFT at two learning rates and SFT at one, two seeds each, and a cell that failed."""
    for method, lr, prior in (("sdft", 4e-4, 0.7), ("sdft", 5e-5, 0.9), ("sft", 1e-4, 0.5)):
        for seed in (0, 1):
            write_run(tmp_path, method, seed, 0.95, prior + seed / 100, lr=lr, hash=f"{lr:.0e}".replace("-", ""))
    write_run(tmp_path, "opd", 0, 0.95, 0.5, state="failed")
    path = tmp_path / "opd-00000000" / "seed-0" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label": "opd, lr 1e-4, seed 0", "reason": "it broke"}))
    return tmp_path


def test_a_study_calls_its_cells_by_what_differs(rates):
    """In order of the rate; a method with one cell keeps its name; sentences have no second comma."""
    runs, left_out = load_study(rates)
    assert list(labels(runs)) == ["sdft, lr 5e-5", "sdft, lr 4e-4", "sft"]
    assert left_out == ["opd, lr 1e-4, seed 0 (opd-00000000/seed-0) is failed (it broke)"]
    assert "sdft (lr 5e-5)" in " ".join(answer(runs, compare(runs)))
    told = printed(rates, 80)
    assert "sdft, lr 5e-5" in told and "Difference from sft" in told and max(map(len, told.splitlines())) <= 80
    write_html(runs, compare(runs), left_out, None, [], rates / "report.html")
    write_csv(runs, rates / "results.csv")
    page = (rates / "report.html").read_text()
    assert "<td>sdft, lr 5e-5</td>" in page and "Learning rates: sdft 5e-5 and 4e-4, sft 1e-4." in page
    rows = list(csv.DictReader((rates / "results.csv").open()))
    assert {row["label"] for row in rows} == set(labels(runs))
    assert {compare(runs, against).baseline for against in ("sdft, lr 5e-5", "sdft-5e05")} == {"sdft, lr 5e-5"}


def test_cells_that_nothing_tells_apart_are_called_by_their_folders(tmp_path):
    for digits in ("a" * 8, "b" * 8):
        write_run(tmp_path, "sft", 0, 0.95, 0.5, hash=digits)
    assert list(labels(load_study(tmp_path)[0])) == ["sft-" + "a" * 8, "sft-" + "b" * 8]


@pytest.mark.slow
def test_a_sweep_says_what_it_varies_and_nothing_else(command, tmp_path):
    """In the terminal, in status.json and in the overview; a cell that is refused has its name too."""
    small = ("trainer.max_steps=1", "task.n_train=16", "task.n_eval=8", "evaluation=none", "study.name=s")
    code, output, _ = command("-m", *small, "method=sft", "optim.lr=1e-4,2e-3", "data.batch_size=4,0")
    assert code != 0 and "sft, lr 1e-4, batch size 4, seed 0 -> " in output
    assert re.search(r"sft, lr 2e-3, batch size 0, seed 0 \(sft-\w+/seed-0\) is failed", output)
    told = {json.loads(path.read_text())["label"] for path in (tmp_path / "out" / "s").glob("*/seed-0/status.json")}
    assert told == {f"sft, lr {lr}, batch size {n}, seed 0" for lr in ("1e-4", "2e-3") for n in (0, 4)}


def test_a_sweep_names_the_keys_that_it_varies():
    """On the command line and in the study's file; a single value on the command line takes an axis away."""
    task, params = (
        ["optim.lr=1e-4,2e-4", "seed=0", "data.batch_size=4"],
        {"method": "sft,opd", "seed": "0,1", "adapter": "lora"},
    )
    assert swept(OmegaConf.create({"hydra": {"overrides": {"task": task}, "sweeper": {"params": params}}})) == "method,optim.lr"


def test_wandb_runs_have_names_groups_and_tags(small, tmp_path, monkeypatch):
    """A configuration that no command line describes has its method's name."""
    taken = {}
    monkeypatch.setattr("opd_lightning.training.loggers.build", lambda node, **more: taken.update(node, **more) or Silent())
    cfg = small("method=sdft", "logger=wandb", "seed=3", "study.name=mine")
    loggers(cfg, tmp_path)
    assert (taken["name"], taken["group"], taken["job_type"], taken["tags"]) == (
        "sdft, seed 3",
        "mine",
        "sdft",
        ["sdft", "seed 3"],
    )


class Silent:
    """A logger that takes hyperparameters."""

    def log_hyperparams(self, params):
        """Nothing."""
