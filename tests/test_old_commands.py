"""Old commands work for one release: those of the README, the docs and conf/ at commit 2d79f2c."""

import logging
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from opd_lightning.config import compose
from opd_lightning.config.compatibility import check
from opd_lightning.config.grammar import quote_arguments
from opd_lightning.config.overrides import explain
from opd_lightning.utils.deprecation import warn_once

COMMANDS = (Path(__file__).parent / "runs" / "commands_at_2d79f2c.txt").read_text().splitlines()
"""What stood behind `python -m opd_lightning`, without the lines whose values were left open."""
RENAMED = [line for line in COMMANDS if re.search(r"support|samples_per|\.samples=|updates_per|rollout\.temperature", line)]

WITHOUT_TEACHER = ["task=deepmath 'model.path=<model>' method=opd", "task=openthoughts 'model.path=<model>'"]


def composed(line: str) -> None:
    """Check the configuration of a command line; of a sweep, that of its first cell."""
    words = quote_arguments(shlex.split(line))
    assert explain(words) is None
    words = [word for word in words if word != "-m" and not word.startswith("hydra")]
    if "-m" in line.split():
        words = [re.sub(r"^([\w./]+=)([^,{\[]+),.*", r"\1\2", word) for word in words]
    check(compose(words))


@pytest.mark.parametrize(
    "line", [*RENAMED[::4], *(pytest.param(x, marks=pytest.mark.slow) for x in RENAMED if x not in RENAMED[::4])]
)
def test_a_command_with_old_names_composes_with_one_warning_for_each(line, caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        composed(line)
    said = [record.message for record in caplog.records if "is read for one release" in record.message]
    assert said and len(said) == len(set(said))


@pytest.mark.parametrize("line", WITHOUT_TEACHER)
def test_a_command_that_left_the_embedded_teacher_to_another_model_is_refused(line):
    """Before, training refused it, for the embedded teacher has another tokenizer than any other model."""
    with pytest.raises(ValueError, match=r"give teacher\.path=<folder, hub id or run>"):
        composed(line)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in (*RENAMED, *WITHOUT_TEACHER)])
def test_a_command_composes(line):
    composed(line)


@pytest.mark.parametrize(
    ("old", "new", "arguments"),
    [
        ("opd_lightning.smollm2", "opd_lightning.models.smollm2", ["{folder}"]),
        (
            "opd_lightning.tasks.pretrain_world",
            "opd_lightning.toy.pretrain",
            ["--out={folder}", "--steps=0", "--teacher-steps=0"],
        ),
    ],
)
def test_an_old_module_is_a_command_with_one_warning(old, new, arguments, tmp_path, monkeypatch, caplog):
    (tmp_path / "config.json").write_text("{}")  # the folder of SmolLM2 is there already
    monkeypatch.setattr(sys, "argv", [old, *(argument.format(folder=tmp_path) for argument in arguments)])
    monkeypatch.delitem(sys.modules, new, raising=False)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        runpy.run_module(old, run_name="__main__")
    said = f"warning: python -m {old} is now python -m {new}; the old name is read for one release."
    assert [record.message for record in caplog.records] == [said]
