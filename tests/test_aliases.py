"""Old names work for one release: run folders, `_target_` paths, keys of the command line."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from opd_lightning.config import build, compose
from opd_lightning.config.aliases import KEYS, MODULES, OBJECTS, moved, renamed, say_once
from opd_lightning.config.names import find
from opd_lightning.evaluate import configuration, evaluate
from opd_lightning.export import export
from opd_lightning.training.run import run

MADE = Path(__file__).resolve().parent / "runs" / "made_at_2d79f2c"


@pytest.fixture
def old(tmp_path) -> Path:
    """A run folder made at commit 2d79f2c: SDFT with LoRA on the embedded model, two updates."""
    shutil.copytree(MADE, tmp_path / "old")
    say_once.cache_clear()
    return tmp_path / "old"


def test_an_old_run_is_evaluated_as_it_was(old, caplog):
    with caplog.at_level(logging.WARNING):
        found = evaluate(configuration([f"run={old}"]))
    before = json.loads((old / "evaluation.json").read_text())["end"]
    assert {name: found[name].value for name in found} == pytest.approx({name: before[name] for name in found})
    assert len([r for r in caplog.records if "earlier version" in r.message]) == 1 and "is now" not in caplog.text


def test_an_old_run_is_exported(old, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(export(old, tmp_path / "exported"))
    assert model.config.vocab_size == 32 and (tmp_path / "exported" / "chat_template.jinja").is_file()


@pytest.mark.parametrize("role", ["model.path", "teacher.path"])
def test_an_old_run_is_a_start_model_and_a_teacher(old, small, role, tmp_path):
    line = [
        "evaluation=none",
        "model.path=pkg://opd_lightning/assets/world/start",
        "model.teacher=pkg://opd_lightning/assets/world/teacher",
    ]
    folder = run(small(*(o for o in line if not o.startswith(role)), f"{role}={old}", "method=opd"))
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("target", [*OBJECTS, *MODULES])
def test_every_old_object_and_module_is_there_by_its_new_name(target):
    assert find(OBJECTS.get(target) or MODULES[target])


def test_an_old_target_of_a_users_configuration_is_built_with_one_warning(caplog):
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            teacher = build({"_target_": "opd_lightning.teacher.Average", "rate": 0.5})
    assert teacher.weights.rate == 0.5 and caplog.text.count("opd_lightning.teacher.Average is now") == 1
    assert moved("torch.optim.AdamW") == "torch.optim.AdamW"


@pytest.mark.parametrize("old", KEYS)
def test_an_old_key_of_the_command_line_is_the_new_one(old, caplog):
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert renamed(f"+{old}=1") == f"+{KEYS[old]}=1" and renamed(f"{old}x=1") == f"{old}x=1"
    assert caplog.text.count("the old name is read for one release") == 1


def test_old_command_lines_of_the_readme_compose():
    assert compose(["method=opd", "loss/support=topk", "micro_tokens=100", "chunk=64"]).model.path
