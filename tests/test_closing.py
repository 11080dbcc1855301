"""Engines are closed once, wherever one is made, when what they are made for fails."""

import pytest
from transformers import AutoModelForCausalLM

from opd_lightning import Distillation
from opd_lightning.check import advice
from opd_lightning.evaluate import evaluate
from opd_lightning.preflight.examine import examine
from opd_lightning.score.make import score
from opd_lightning.training.run import run
from tests.failing_engine import FailingEngine

TARGET = "generator._target_=tests.failing_engine.FailingEngine"


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    for name, value in (("made", 0), ("closed", 0), ("fails", True)):
        monkeypatch.setattr(FailingEngine, name, value)


USES = {
    "run": lambda cfg, folder: run(cfg),
    "evaluate": lambda cfg, folder: evaluate(cfg),
    "check": lambda cfg, folder: examine(cfg),
    "advise": lambda cfg, folder: advice(cfg, {}),
    "score": lambda cfg, folder: score(cfg, folder / "kept"),
}


@pytest.mark.parametrize(
    "use", [use if use in ("run", "evaluate") else pytest.param(use, marks=pytest.mark.slow) for use in USES]
)
def test_an_engine_that_fails_is_closed(small, tmp_path, use):
    with pytest.raises(RuntimeError, match="the engine is gone"):
        USES[use](small(TARGET, "method=opd"), tmp_path)
    assert (FailingEngine.made, FailingEngine.closed) == (1, 1)


def test_an_error_before_training_closes_it_too(small, monkeypatch):
    def refuse(*_):
        raise ValueError("refused")

    monkeypatch.setattr("opd_lightning.training.run.checked", refuse)
    with pytest.raises(ValueError, match="refused"):
        run(small(TARGET))
    monkeypatch.setattr("opd_lightning.preflight.components.fitting", refuse)
    with pytest.raises(ValueError, match="refused"):
        run(small(TARGET, "data.overlong=drop", "seed=1"))
    assert (FailingEngine.made, FailingEngine.closed) == (2, 2)


@pytest.mark.slow
def test_an_error_in_a_trainer_of_the_users_closes_it(tiny, other):
    models = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny, other))
    prompts = ["sort 3 1 2", "sort 2 1", "sort 4 3 1", "sort 4 1", "sort 3 1"] * 4
    student, teacher = models
    made = Distillation("opd", student, prompts, teacher=teacher, overrides=[TARGET, "task.max_new_tokens=4"])
    with pytest.raises(RuntimeError, match="the engine is gone"):
        made.trainer(max_steps=1, accelerator="cpu").fit(made.module, made.data)
    assert (FailingEngine.made, FailingEngine.closed) == (1, 1)
    made.close()
    assert FailingEngine.closed == 2
