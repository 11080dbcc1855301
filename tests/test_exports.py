"""Exports out of the ecosystem of this package: adapters for PEFT, model cards, permissions, the hub."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import export as command
from opd_lightning.config import compose
from opd_lightning.export import export
from opd_lightning.models import Pretrained
from opd_lightning.reporting.card import is_hub_id, named
from opd_lightning.training.run import run

LORA = ("adapter=lora", "adapter.r=2", "optim.lr=0.05")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run that has trained all weights."""
    words = ["method=sft", f"model.path={tiny}", f"output_dir={tmp_path_factory.mktemp('out')}", "logger=none"]
    words += ["trainer.accelerator=cpu", "trainer.max_steps=2", "data.batch_size=4", "task.n_train=16", "task.n_eval=8"]
    return run(compose(words))


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process: what it printed, or its error."""

    def run_command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        try:
            command.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return run_command


def test_an_adapter_alone_loads_with_peft_and_gives_the_runs_logits(small, tiny, tmp_path, call):
    folder = run(small("method=sft", *LORA))
    assert call(f"run={folder}", "adapter=true").endswith(f"exported: {folder / 'adapter'}\n")
    out, ids = folder / "adapter", torch.arange(6)[None]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny
    assert not (out / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny)
    before = base(ids).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, out)
    with torch.no_grad():
        logits, expected = adapted(ids).logits, Pretrained(str(folder)).model()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "merged"))(ids).logits
    assert torch.allclose(logits, expected, atol=1e-5) and torch.allclose(merged, expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert torch.allclose(Pretrained(str(out)).model()(ids).logits, expected, atol=1e-5)  # and this package reads it


@pytest.mark.slow
def test_an_adapter_on_a_runs_result_names_a_folder_that_others_can_load(small, tiny, tmp_path):
    first = run(small("method=sft"))
    second = run(small("method=sft", f"model.path={first}", *LORA))
    with pytest.raises(ValueError, match=r"is no plain model\. Export it"):
        export(second, tmp_path / "alone", adapter=True)
    with pytest.raises(ValueError, match="has other weights than the adapter was trained on"):
        export(second, tmp_path / "alone", adapter=True, base=tiny)
    base = export(first, tmp_path / "base")
    out = export(second, tmp_path / "alone", adapter=True, base=str(base))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    with pytest.raises(ValueError, match="has trained all weights"):
        export(first, tmp_path / "none", adapter=True)


def test_the_model_card_says_how_the_model_was_made_and_is_loaded(finished, tmp_path):
    text = (export(finished, tmp_path / "exported") / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # the start model is a local folder
    assert "`tiny`" in text and str(tmp_path) not in text
    for part in ("method `sft`", "16 training examples", "new/accuracy", "License", "terms of the base model", "updates: 2"):
        assert part in text, part
    assert 'AutoModelForCausalLM.from_pretrained("exported")' in text


def test_paths_of_this_machine_are_not_published(tmp_path):
    assert named("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B" and is_hub_id("gpt2")
    assert named(str(tmp_path / "secret" / "model")) == "model"
    assert named(str(tmp_path / "sft-1a2b3c4d" / "seed-0")) == "sft-1a2b3c4d/seed-0"
    assert not is_hub_id(str(tmp_path)) and not is_hub_id("pkg://a/b") and not is_hub_id("../models/x")


def test_files_have_the_permissions_that_the_umask_gives(finished, tmp_path):
    before = os.umask(0o022)
    try:
        out = export(finished, tmp_path / "exported")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()} == {0o644}


def test_wrong_options_are_one_sentence(call, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert call("--help").startswith("python -m opd_lightning.export") and "adapter=true" in call()
    assert "adapter=yes should be true or false" in call("run=x", "adapter=yes")
    assert "is no repository's name" in call("run=x", "push=a/b/c")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "needs a token of the hub" in call("run=x", "push=me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    assert "is no run folder" in call("run=x", "push=me/model")


class Hub:
    """A hub that records what is pushed."""

    made: list[dict]
    refuses = False

    class Address(str):
        repo_id = "me/model"

    def create_repo(self, repository: str, **options) -> Address:
        Hub.made.append({"repository": repository, **options})
        if Hub.refuses:
            raise OSError("403 Forbidden")
        return Hub.Address("https://hub/me/model")

    def upload_folder(self, repo_id: str, folder_path: Path, **options) -> None:
        Hub.made[-1] |= {"to": repo_id, "files": {path.name for path in Path(folder_path).iterdir()}}


@pytest.mark.slow
def test_push_uploads_the_folder_to_a_private_repository(finished, call, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.made, Hub.refuses = [], False
    assert "pushed" not in call(f"run={finished}", f"to={tmp_path / 'kept'}") and not Hub.made  # never by default
    assert "pushed: https://hub/me/model" in call(f"run={finished}", f"to={tmp_path / 'a'}", "push=me/model")
    assert Hub.made[0] | {"files": 0} == {
        "repository": "me/model",
        "private": True,
        "exist_ok": True,
        "to": "me/model",
        "files": 0,
    }
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= Hub.made[0]["files"]
    assert 'from_pretrained("me/model")' in (tmp_path / "a" / "README.md").read_text()
    call(f"run={finished}", f"to={tmp_path / 'b'}", "push=me/model", "private=false")
    assert Hub.made[1]["private"] is False
    Hub.refuses = True
    answer = call(f"run={finished}", f"to={tmp_path / 'c'}", "push=me/model")
    assert "the hub did not take it (403 Forbidden)" in answer and (tmp_path / "c" / "README.md").is_file()
