"""The console command and what `evaluate` shows and writes."""

import csv
import json
import sys

import pytest
from omegaconf import OmegaConf

from opd_lightning import commands, evaluate
from opd_lightning.evaluation import Estimate


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs the console command: exit code or sentence, and what it printed."""

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["opd-lightning", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        code: object = 0
        try:
            commands.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_tells_of_itself(told, name):
    code, output = told(name, "--help")
    assert code in (0, None) and f"opd_lightning.{name}" in output


def test_what_is_no_command_is_a_sentence(told):
    assert told("evalute", "run=x")[0] == "error: evalute is no command; did you mean evaluate?"
    code, output = told("help")
    assert code == 0 and all(f"opd-lightning {name}" in output for name in commands.COMMANDS)
    assert "lr=1 is no key" in str(told("lr=1")[0])  # an override is for training


def test_numbers_are_shown_and_written(tmp_path, capsys):
    numbers = {"new/accuracy": Estimate(0.5, 8, 0.25, 0.75), "new/length": Estimate(7.0)}
    evaluate.show(numbers, "a model")
    table = capsys.readouterr().out
    assert "0.500 [0.250, 0.750]" in table and "new/length" in table
    evaluate.write(numbers, tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content == {
        "new/accuracy": {"value": 0.5, "prompts": 8, "low": 0.25, "high": 0.75},
        "new/length": {"value": 7.0},
    }
    evaluate.write(numbers, tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert rows[0] == {"name": "new/accuracy", "value": "0.5", "prompts": "8", "low": "0.25", "high": "0.75"}
    assert rows[1]["low"] == ""


@pytest.mark.slow
def test_a_run_is_evaluated_into_a_file(command, tmp_path):
    code, output, _ = command("method=sft", "trainer.max_steps=1", "task.n_train=16", "task.n_eval=4")
    assert code == 0, output
    folder = next((tmp_path / "out").rglob("status.json")).parent
    for to in ("numbers.json", "numbers.csv"):
        code, output, _ = command(f"run={folder}", f"to={tmp_path / to}", main=evaluate.main, defaults=False)
        assert code == 0 and "new/accuracy" in output and (tmp_path / to).is_file(), output


def test_evaluate_writes_where_it_is_told(monkeypatch, capsys, tmp_path):
    for name in ("check_values", "check_made"):
        monkeypatch.setattr(evaluate, name, lambda cfg: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda cfg: {"new/accuracy": Estimate(0.5)})
    monkeypatch.setattr(evaluate, "configuration", lambda words: OmegaConf.create({"model": {"path": words[0]}}))
    monkeypatch.setattr(sys, "argv", ["evaluate", "method=sft", f"to={tmp_path / 'x.json'}"])
    evaluate.main()
    output = capsys.readouterr().out
    assert "0.500" in output and "method=sft" in output and json.loads((tmp_path / "x.json").read_text())["new/accuracy"]


def test_a_wrong_file_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"should end in \.json or \.csv"):
        evaluate.target([f"to={tmp_path / 'x.txt'}"])
    with pytest.raises(ValueError, match="there is no folder"):
        evaluate.target([f"to={tmp_path / 'no' / 'x.json'}"])
    assert evaluate.target(["run=x"]) == (None, ["run=x"])
