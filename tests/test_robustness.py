"""Perturbations: what is forced is forced, what is mended is mended, and the weights come back."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluation import GreedyAccuracy, HarnessTasks, Perturbations, Robustness
from opd_lightning.evaluation.robustness import foreign_token, noisy
from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.models import Pretrained, Student
from opd_lightning.toy.world import WorldTask, world_tokenizer
from opd_lightning.types import Verdict

START = "pkg://opd_lightning/toy/assets/world/start"


@pytest.fixture(scope="module")
def start() -> Student:
    return Student(Pretrained(START).model())


@pytest.fixture(scope="module")
def generator(start) -> TransformersGenerator:
    engine = TransformersGenerator(world_tokenizer())
    engine.update_weights(start, 0)
    return engine


def robustness(task=None, skill="prior", **options) -> Robustness:
    task = task or WorldTask(n_eval=32)
    return Robustness(task, ChatRenderer(world_tokenizer()), task.max_new_tokens, Perturbations(**options), skill)


def test_without_perturbation_it_is_greedy_accuracy(start, generator):
    task = WorldTask(n_eval=32)
    greedy = GreedyAccuracy(task, ChatRenderer(world_tokenizer()), task.max_new_tokens)(start, {}, generator)["prior/accuracy"]
    found = robustness(noises=[1e-9])(start, {}, generator)
    assert found["robust/none"] == greedy and found["robust/noise_1e-09"].value == greedy.value


def test_the_mean_and_the_worst_are_over_perturbations(start, generator):
    found = robustness(openings=["answer", "result"], corrupted=[2], distractors=["red"], temperatures=[1.0], noises=[0.5])(
        start, {}, generator
    )
    values = [e.value for name, e in found.items() if name not in ("robust/mean", "robust/worst", "robust/none")]
    assert len(values) == 6 and found["robust/worst"].value == min(values) < found["robust/none"].value
    assert found["robust/mean"].value == pytest.approx(sum(values) / 6)
    assert found["robust/noise_0.5"].value < found["robust/none"].value  # the engine was given the noise


def test_an_opening_is_forced_and_judged(start, generator):
    seen = []

    class Listening(WorldTask):
        def verify(self, example, completion) -> Verdict:
            seen.append(completion)
            return super().verify(example, completion)

    robustness(Listening(n_eval=8), openings=["result"])(start, {}, generator)
    assert all(text.startswith("result") for text in seen[:8]) and all(text.startswith("answer") for text in seen[8:])


def test_recovery_is_judged_with_the_foreign_token_mended(start, generator):
    """The start model, pre-trained on corrupted answers, goes on rightly; one that copies the corruption's owner would not."""
    assert robustness(corrupted=[2])(start, {}, generator)["robust/corrupted_2"].value > 0.8
    rows = [[7, 1, 2], [7, 3, 4], [7, 1]]
    assert foreign_token(rows, 0, 1) == 3 and foreign_token(rows, 2, 1) is None
    assert foreign_token(rows, 0, 0) == 3  # where all answers agree, what stands behind it in the next one


def test_noise_is_drawn_by_its_seed_and_leaves_no_trace(start):
    before = {k: v.clone() for k, v in start.state_dict().items()}
    seen = []
    for _ in range(2):
        with noisy(start, 0.1, seed=3):
            seen.append(torch.cat([p.flatten() for p in start.parameters()]))
    assert torch.equal(*seen) and all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    flat = torch.cat([v.flatten() for k, v in start.named_parameters()])
    assert 0.02 < (seen[0] - flat).std() / flat.std() < 0.3


@pytest.mark.slow
def test_any_task_of_the_harness_is_asked_of_the_student_in_memory(start, generator, tmp_path, monkeypatch):
    """A task of our own file, for the harness's are on a hub."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    choices = [{"q": f"copy {i} 1 2 3 4 =", "choices": [f"answer {i} 1 2 3 4", "result 9 9"], "gold": 0} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    task = {"task": "tiny_world", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{q}}"}
    task |= {
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    asked = HarnessTasks(["tiny_world"], world_tokenizer(), chat=False, include_path=str(tmp_path))
    assert asked(start, {}, generator)["harness/tiny_world.acc"].value == 1.0


def test_the_harness_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("opd_lightning.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'opd-lightning\[harness\]'"):
        HarnessTasks(["ifeval"], world_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "perturbations is empty"),
        ({"noises": [0.1], "skill": "none"}, "no example of the test split has the skill 'none'"),
        ({"noises": [-1.0]}, "must not be negative"),
    ],
)
def test_bad_robustness_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        robustness(**options)


def test_a_task_without_a_verifier_is_refused():
    task = WorldTask(n_eval=8)
    task.verifies = False
    with pytest.raises(ValueError, match="no verifier"):
        robustness(task, noises=[0.1])


def test_sampling_settings_are_replaced_not_shared():
    evaluation = robustness(temperatures=[1.0])
    assert replace(evaluation.sampling, temperature=1.0) != evaluation.sampling and evaluation.ends_only
