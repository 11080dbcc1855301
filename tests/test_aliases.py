"""Old names work for one release: run folders, `_target_` paths, keys of the command line."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from opd_lightning.config import build, compose
from opd_lightning.config.aliases import KEYS, MODULES, OBJECTS, moved, renamed, warn_once
from opd_lightning.config.names import find
from opd_lightning.evaluate import configuration, evaluate
from opd_lightning.export import export
from opd_lightning.training.run import run

MADE = Path(__file__).resolve().parent / "runs" / "made_at_2d79f2c"


@pytest.fixture
def old(tmp_path) -> Path:
    """A run folder made at commit 2d79f2c: SDFT with LoRA on the embedded model, two updates."""
    shutil.copytree(MADE, tmp_path / "old")
    warn_once.cache_clear()
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
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            teacher = build({"_target_": "opd_lightning.teacher.Average", "rate": 0.5})
    assert teacher.weights.rate == 0.5 and caplog.text.count("opd_lightning.teacher.Average is now") == 1
    assert moved("torch.optim.AdamW") == "torch.optim.AdamW"


@pytest.mark.parametrize("old", KEYS)
def test_an_old_key_of_the_command_line_is_the_new_one(old, caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert renamed(f"+{old}=1") == f"+{KEYS[old]}=1" and renamed(f"{old}x=1") == f"{old}x=1"
    assert caplog.text.count("the old name is read for one release") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss.support.rest=renormalise", "loss.vocab_support.tail_bucket=false"),
        ("loss.vocab_support.rest=tail,renormalise", "loss.vocab_support.tail_bucket=true,false"),
        ("rollout.truncated=keep,mask", "rollout.mask_truncated_completions=false,true"),
    ],
)
def test_old_values_of_the_command_line_are_the_new_ones(old, new):
    assert renamed(old) == new


def test_old_command_lines_of_the_readme_compose():
    assert compose(["method=opd", "loss/support=topk", "micro_tokens=100", "chunk=64"]).model.path


def test_old_names_in_a_users_own_file_are_read(tmp_path, caplog):
    """The package's own YAML has none; a user's experiment may."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [{override /method: gkd}, {override /evaluation: sampled}, _self_]\n"
        "micro_tokens: 100\n"
        "rollout: {temperature: 0.8, truncated: mask, samples_per_prompt: 2, other: {samples_per_prompt: 2}}\n"
        "loss: {support: {k: 5, rest: renormalise}, aggregate: {tokens: '${rollout.max_new_tokens}'}}\n"
        "evaluation: {suite: {sampled: {samples: 9, template_options: {enable_thinking: true}}}}\n"
    )
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        cfg = compose(["experiment=mine", "rollout.top_p=0.5"], [tmp_path])
    assert cfg.max_tokens_per_microbatch == 100 and cfg.loss.vocab_support.k == 5
    assert cfg.loss.vocab_support.get("tail_bucket") is False
    assert cfg.rollout.sampling == {
        "_target_": "opd_lightning.types.SamplingParams",
        "max_new_tokens": cfg.task.max_new_tokens,
        "temperature": 0.8,
        "top_p": 0.5,
        "top_k": 0,
    }
    assert cfg.rollout.mask_truncated_completions is True and cfg.rollout.num_generations == 2
    assert cfg.loss.aggregate.tokens == cfg.task.max_new_tokens
    sampled = cfg.evaluation.suite.sampled
    assert sampled.sampling.n == 9 and sampled.renderer.template_options.enable_thinking
    assert caplog.text.count("the old name is read for one release") >= 5


def test_the_old_name_of_the_first_stage_is_read_with_one_warning(tmp_path, caplog):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nstart_from: [method=sft]\n")
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        own, spelled = compose(["experiment=mine"], [tmp_path]), compose(["start_from=[method=sft]"])
    assert own.init_from_run == spelled.init_from_run == ["method=sft"] and "start_from" not in own
    assert caplog.text.count("start_from is now init_from_run") == 1
