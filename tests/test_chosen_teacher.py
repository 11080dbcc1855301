"""A teacher that came with a model option beside another model: training asks or warns, evaluation leaves it out."""

import pytest

from opd_lightning import Distillation
from opd_lightning.config import compose
from opd_lightning.config.compatibility import check, inherited_teacher
from opd_lightning.evaluate import evaluate

QWEN = "model=qwen3_1.7b"


@pytest.mark.parametrize("option", ["smollm2", "qwen3_1.7b", "qwen3_8b_base"])
def test_the_teacher_of_an_option_beside_another_model_is_said(tmp_path, option):
    cfg = compose([f"model={option}", f"model.path={tmp_path}"])
    (warning,) = check(cfg)
    assert f"teacher.path={cfg.model.teacher} comes with the option of model=" in warning and "give teacher.path=" in warning


@pytest.mark.parametrize(
    "words",
    [
        [QWEN],
        [QWEN, "model.stand_in=true"],
        [QWEN, "model.path=mine", "teacher.path=Qwen/Qwen3-8B"],
        [QWEN, "model.path=mine", "model.teacher=Qwen/Qwen3-8B"],
        [QWEN, "model.path=mine", "method=sdft"],
        ["model.path=pkg://opd_lightning/toy/assets/world/teacher"],
    ],
)
def test_a_teacher_that_belongs_or_was_chosen_is_not(words):
    assert inherited_teacher(compose(words)) is None


def test_the_embedded_teacher_may_be_chosen_in_python(tiny):
    prompts = [f"rotate {' '.join(f'{i:05}')}" for i in range(20)]
    teacher = "pkg://opd_lightning/toy/assets/world/teacher"
    assert Distillation("opd", tiny, prompts, teacher=teacher, overrides={"task.max_new_tokens": 8}).cfg.teacher.path == teacher


def test_evaluation_needs_no_teacher(small, tiny, other, capsys):
    for words in ([], ["method=seqkd"], ["model=smollm2"]):
        found = evaluate(small(f"model.path={tiny}", "~model.teacher", "evaluation=accuracy", "task.n_eval=4", *words))
        assert "new/accuracy" in found and "teacher/shown/accuracy" not in found
        assert "no teacher is measured" in capsys.readouterr().err
    measured = evaluate(small(f"model.path={other}", f"teacher.path={other}", "evaluation=accuracy", "task.n_eval=4"))
    assert measured["teacher/shown/accuracy"].value == measured["teacher/shown/student_accuracy"].value
    assert "no teacher" not in capsys.readouterr().err
