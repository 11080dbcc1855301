"""A resumed run knows the models again that its checkpoint does not hold: teachers, the start model, the engine."""

from types import SimpleNamespace

import pytest
import torch
from conftest import save_tiny
from served import Served
from transformers import AutoModelForCausalLM

from opd_lightning.score.make import score
from opd_lightning.step.checkpoint import check_unchanged, fingerprints
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.training.run import run


def test_another_served_model_is_refused(small, tiny, other):
    """At the same address there is another model when the run goes on."""
    server = Served(other)
    common = ["method=opd_topk", "loss.vocab_support.k=8", "teacher=remote", f"teacher.servers.urls={server.url}"]
    try:
        run(small(*common, "evaluation=none", "trainer.max_steps=1"))
        server.lm = AutoModelForCausalLM.from_pretrained(tiny).eval()
        with pytest.raises(ValueError, match=f"{server.url} .*the teacher is not what it was .* choose another study.name"):
            run(small(*common, "evaluation=none", "trainer.max_steps=2"))
    finally:
        server.close()


@pytest.mark.parametrize(
    ("changed", "overrides"),
    [
        ("teacher", ("method=opd",)),
        pytest.param("student", ("method=sdft", "teacher=frozen"), marks=pytest.mark.slow),
        pytest.param("student", ("method=sft", "adapter=lora"), marks=pytest.mark.slow),
    ],
)
def test_other_weights_at_the_same_path_are_refused(small, tmp_path, changed, overrides):
    """A teacher, and the start model where a teacher or an adapter stands on it."""
    for seed, name in enumerate(("student", "teacher")):
        save_tiny(tmp_path / name, seed)
    given = [*overrides, f"model.path={tmp_path / 'student'}", f"model.teacher={tmp_path / 'teacher'}", "evaluation=none"]
    run(small(*given, "trainer.max_steps=1"))
    save_tiny(tmp_path / changed, 9)
    with pytest.raises(ValueError, match=r"is not what it was .* bring it back, or choose another study.name"):
        run(small(*given, "trainer.max_steps=2"))


def module(engine: str, numbers: torch.Tensor, **rollout: bool) -> SimpleNamespace:
    """What is read of a module."""
    made = {"student_writes": True, "teachers": frozenset()} | rollout
    base = Fingerprint("model.path=m", numbers, 0.01)
    return SimpleNamespace(engine=engine, teachers={}, base=base, rollout=SimpleNamespace(**made), global_rank=0)


def test_rounding_passes_and_another_engine_is_warned_of(caplog):
    numbers = torch.tensor([-1.0, -torch.inf])
    saved = {"fingerprints": {"start model": numbers + 0.001}, "engine": "VLLM"}
    check_unchanged(module("VLLM", numbers), saved)
    check_unchanged(module("TransformersGenerator", numbers, student_writes=False), saved)
    check_unchanged(module("TransformersGenerator", numbers), {})  # of an earlier version
    assert not caplog.text
    check_unchanged(module("TransformersGenerator", numbers), saved)
    assert "VLLM wrote this run's completions before, and TransformersGenerator goes on" in caplog.text
    with pytest.raises(ValueError, match=r"model.path=m: the start model is not what it was"):
        check_unchanged(module("VLLM", numbers + 1), saved)
    assert set(fingerprints(module("VLLM", numbers))) == {"start model"}


@pytest.mark.slow
def test_another_folder_of_scores_is_refused(small, tmp_path):
    out = tmp_path / "scores"
    train = ["method=kd", "loss/vocab_support=topk", "loss.vocab_support.k=8", "teacher=cached", f"teacher.path={out}"]
    for seed in (1, 2):
        teacher = save_tiny(tmp_path / "teacher", seed)
        score(small("method=kd", f"model.teacher={teacher}"), out)
        if seed == 1:
            run(small(*train, "evaluation=none", "trainer.max_steps=1"))
            out.rename(tmp_path / "before")
    with pytest.raises(ValueError, match=r"teacher.path=.*scores: the teacher is not what it was"):
        run(small(*train, "evaluation=none", "trainer.max_steps=2"))
