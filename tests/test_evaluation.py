"""Evaluations: equal to plain forward passes, zero where the teacher is the student, and the same every time."""

import pytest
import torch

from opd_lightning.context import NoContext
from opd_lightning.evaluation import GreedyAccuracy, GreedyAnswers, ReferenceLikelihood, TeacherDivergence
from opd_lightning.models import Pretrained, Student
from opd_lightning.tasks.instructions import InstructionTask
from opd_lightning.tasks.world import WorldTask
from opd_lightning.teacher import External, FrozenStart, Scorer


@pytest.fixture(scope="module")
def model(tiny):
    pretrained = Pretrained(tiny)
    return Student(pretrained.model()).train(), pretrained.tokenizer()


def scorers(student, tokenizer, weights):
    weights.attach(student, tokenizer)
    return {"teacher": Scorer(weights, NoContext(), tokenizer)}


def test_divergence_is_zero_from_itself_and_positive_from_another(model, other):
    student, tokenizer = model
    evaluation = TeacherDivergence(WorldTask(n_eval=8), tokenizer, 6, batch_size=5)
    same = evaluation(student, scorers(student, tokenizer, FrozenStart()))
    assert abs(same["heldout/reverse_kl"]) < 1e-6 and abs(same["heldout/forward_kl"]) < 1e-6
    first = evaluation(student, scorers(student, tokenizer, External(other)))
    assert first["heldout/reverse_kl"] > 0.01 and student.training
    assert evaluation(student, scorers(student, tokenizer, External(other))) == first
    assert evaluation(student, {}) == {}


def test_likelihood_is_that_of_a_plain_forward_pass(model, other):
    student, tokenizer = model
    task = WorldTask(n_eval=6)
    scores = ReferenceLikelihood(task, tokenizer, n=6, batch_size=4)(student, scorers(student, tokenizer, External(other)))
    for name, lm in (("log_likelihood", student.lm), ("teacher_log_likelihood", Pretrained(other).model())):
        total, count = 0.0, 0
        for example in task.examples("test")[:6]:
            prompt = tokenizer(example.messages[0]["content"] + " =").input_ids
            answer = [*tokenizer(example.completion).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                log_p = lm(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            total += sum(log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
            count += len(answer)
        assert scores[f"heldout/{name}"] == pytest.approx(total / count, rel=1e-4)


def test_accuracy_does_not_depend_on_how_prompts_are_batched(model):
    student, tokenizer = model
    task = WorldTask(n_eval=12)
    assert GreedyAccuracy(task, tokenizer, 8, batch_size=5)(student, {}) == GreedyAccuracy(task, tokenizer, 8)(student, {})


def test_answers_are_one_per_prompt(model):
    student, tokenizer = model
    evaluation = GreedyAnswers(WorldTask(), tokenizer, 5, n=3)
    assert len(evaluation(student)) == len(evaluation.prompts) == 3


def test_shipped_instructions_are_disjoint_and_answered():
    task, rest = InstructionTask(n_train=160), InstructionTask(n_train=160, first=160, narrow=True)
    train, narrow = task.examples("train"), rest.examples("train")
    held = [*task.examples("validation"), *task.examples("test")]
    prompts = [e.messages[0]["content"] for e in [*train, *narrow, *held]]
    assert len(set(prompts)) == len(prompts) == 416 and all(e.completion for e in held)
    assert narrow[0].completion == f"ANSWER: {narrow[0].messages[0]['content'].upper()}"
    assert rest.verify(narrow[0], narrow[0].completion).content == 1.0 and rest.verify(narrow[0], "No.").content == 0.0
    with pytest.raises(ValueError, match=r"task\.first=200"):
        InstructionTask(n_train=160, first=200).examples("train")
