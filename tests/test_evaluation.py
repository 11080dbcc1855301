"""Evaluations: equal to plain forward passes, zero where the teacher is the student, and the same every time."""

from itertools import combinations
from math import comb

import pytest
import torch

from opd_lightning.callbacks.diagnostics import ngrams, repetition
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluation import (
    GreedyAccuracy,
    GreedyAnswers,
    ReferenceLikelihood,
    SampledAccuracy,
    StartDivergence,
    TeacherAccuracy,
    TeacherDivergence,
)
from opd_lightning.evaluation.estimate import pass_at, proportion
from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.models import Pretrained, Student
from opd_lightning.teachers import LocalTeacher, external, frozen
from opd_lightning.teachers.contexts import PrivilegedContext
from opd_lightning.toy.instructions import InstructionTask
from opd_lightning.toy.world import WorldTask
from opd_lightning.types import SamplingParams


def writing(student: Student, tokenizer) -> TransformersGenerator:
    """An engine with the student's weights."""
    generator = TransformersGenerator(tokenizer)
    generator.update_weights(student, 0)
    return generator


@pytest.fixture(scope="module")
def model(tiny):
    pretrained = Pretrained(tiny)
    student, tokenizer = Student(pretrained.model()).train(), pretrained.tokenizer()
    return student, tokenizer, writing(student, tokenizer)


def teachers(student, tokenizer, teacher: LocalTeacher) -> dict[str, LocalTeacher]:
    teacher.check_tokenizer(tokenizer)
    teacher.setup(student, ChatRenderer(tokenizer))
    return {"teacher": teacher}


def test_divergence_is_zero_from_itself_and_positive_from_another(model, other):
    student, tokenizer, generator = model
    evaluation = TeacherDivergence(WorldTask(n_eval=8), ChatRenderer(tokenizer), 6, batch_size=5)
    same = evaluation(student, teachers(student, tokenizer, frozen()), generator)
    assert abs(same["heldout/reverse_kl"].value) < 1e-6 and abs(same["heldout/forward_kl"].value) < 1e-6
    first = evaluation(student, teachers(student, tokenizer, external(other)), generator)
    assert first["heldout/reverse_kl"].value > 0.01 and student.training
    assert evaluation(student, teachers(student, tokenizer, external(other)), generator) == first
    assert evaluation(student, {}, generator) == {}


def test_likelihood_is_that_of_a_plain_forward_pass(model, other):
    student, tokenizer, generator = model
    task = WorldTask(n_eval=6)
    scores = ReferenceLikelihood(task, ChatRenderer(tokenizer), n=6, batch_size=4)(
        student, teachers(student, tokenizer, external(other)), generator
    )
    for name, lm in (("log_likelihood", student.lm), ("teacher_log_likelihood", Pretrained(other).model())):
        total, count = 0.0, 0
        for example in task.examples("test")[:6]:
            prompt = tokenizer(example.messages[0]["content"] + " =").input_ids
            answer = [*tokenizer(example.completion).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                log_p = lm(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            total += sum(log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
            count += len(answer)
        assert scores[f"heldout/{name}"].value == pytest.approx(total / count, rel=1e-4)


def test_accuracy_does_not_depend_on_how_prompts_are_batched(model):
    student, tokenizer, generator = model
    task = WorldTask(n_eval=12)
    parts, whole = (
        GreedyAccuracy(task, ChatRenderer(tokenizer), 8, batch_size=5),
        GreedyAccuracy(task, ChatRenderer(tokenizer), 8),
    )
    assert parts(student, {}, generator) == whole(student, {}, generator)


def test_sampled_accuracy_draws_the_same_every_time_and_reports_every_k(model):
    student, tokenizer, generator = model
    evaluation = SampledAccuracy(WorldTask(n_eval=6), ChatRenderer(tokenizer), SamplingParams(4, n=3), passes=(1, 3))
    scores = evaluation(student, {}, generator)
    assert scores == evaluation(student, {}, generator) and scores["new/avg@3"].prompts == 6
    assert scores["new/pass@1"].value == pytest.approx(scores["new/avg@3"].value)
    assert {"new/avg@3", "new/pass@3", "prior/pass@1", "prior/sort/pass@3"} <= set(scores)


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, right, k):
    samples = [i < right for i in range(n)]
    subsets = list(combinations(samples, k))
    assert pass_at(k, n, right) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ValueError, match=f"pass@{n + 1}"):
        pass_at(n + 1, n, right)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.95])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(p):
    """Exactly, by enumerating the binomial outcomes of 64 prompts; Wilson's interval is not conservative for each p."""
    n = 64
    covered = 0.0
    for c in range(n + 1):
        estimate = proportion([1.0] * c + [0.0] * (n - c))
        covered += comb(n, c) * p**c * (1 - p) ** (n - c) * (estimate.low <= p <= estimate.high)
    assert 0.92 < covered < 0.99
    everything = proportion([1.0] * n)
    assert everything.high == pytest.approx(1.0) and 0.9 < everything.low < 1.0 and everything.prompts == n


def test_length_truncation_and_format_are_those_of_the_answers(model):
    student, tokenizer, generator = model
    scores = GreedyAccuracy(WorldTask(n_eval=8), ChatRenderer(tokenizer), 3)(student, {}, generator)
    assert 1 <= scores["new/length"].value <= 3 and scores["new/length"].low <= scores["new/length"].value
    assert scores["new/truncated"].value == pytest.approx(
        1.0 if scores["new/length"].value == 3 else scores["new/truncated"].value
    )
    assert scores["new/format"].prompts == 8


@pytest.mark.parametrize("options", [{"n": 2}, {"n": 3, "temperature": 0.0}])
def test_bad_sampled_evaluations_are_refused(model, options):
    with pytest.raises(ValueError, match=r"evaluation\.suite\.sampled\."):
        SampledAccuracy(WorldTask(n_eval=4), ChatRenderer(model[1]), SamplingParams(4, **options), passes=(3,))


def test_answers_are_one_per_prompt(model):
    _, tokenizer, generator = model
    evaluation = GreedyAnswers(WorldTask(), ChatRenderer(tokenizer), 5, n=3)
    assert len(evaluation(generator)) == len(evaluation.prompts) == 3


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


def test_the_teacher_is_measured_with_its_context_and_the_student_without():
    start = Pretrained("pkg://opd_lightning/toy/assets/world/start")
    task, tokenizer, student = WorldTask(n_eval=4), start.tokenizer(), Student(start.model())
    generator = writing(student, tokenizer)
    known = teachers(student, tokenizer, frozen(PrivilegedContext("demonstration", "{prompt} [ {demonstration} ]")))
    evaluation = TeacherAccuracy(task, ChatRenderer(tokenizer), max_new_tokens=12, n=4)
    found = {name: e.value for name, e in evaluation(student, known, generator).items()}
    assert found == {"teacher/shown/accuracy": 1.0, "teacher/shown/student_accuracy": 0.0}
    assert evaluation.warnings(found) == [] and evaluation(student, {}, generator) == {}
    (warning,) = evaluation.warnings({"teacher/shown/accuracy": 0.25, "teacher/shown/student_accuracy": 0.5})
    assert "0.250" in warning and "0.500" in warning


def test_the_distance_to_the_start_is_zero_at_the_start_and_by_skill(tiny):
    model, task = Pretrained(tiny), WorldTask(n_eval=8)
    student = Student(model.model())
    generator = writing(student, model.tokenizer())
    prior = StartDivergence(model, task, ChatRenderer(model.tokenizer()), max_new_tokens=4, skill="prior")
    assert {e.skill.split("/")[0] for e in prior.examples} == {"prior"}
    assert all(abs(e.value) < 1e-6 for e in prior(student, {}, generator).values())
    for p in student.parameters():
        p.data += 0.05
    assert all(e.value > 1e-3 for e in prior(student, {}, generator).values())
    with pytest.raises(ValueError, match="has the skill 'fly'"):
        StartDivergence(model, task, ChatRenderer(model.tokenizer()), max_new_tokens=4, skill="fly")


def test_repetition_and_leakage():
    assert repetition([1, 2, 3, 4]) == 0.0 and repetition([1] * 7) == 0.75 and repetition([]) == 0.0
    wording = ngrams("An example of a good answer:\nAnswer in your own words.")
    assert ("an", "example", "of", "a") in wording and ("good", "answer", "answer", "in") not in wording
    assert ngrams("Here is an example of a GOOD answer.") & wording


def test_a_rule_is_verified_by_its_pattern_on_held_out_instructions():
    task = InstructionTask(pattern=r"(- [^\n]+(\n+|$))+", spare=72)
    test, validation, train = (task.examples(split) for split in ("test", "validation", "train"))
    assert task.verifies and len(test) == len(validation) == 120 and len({e.id for e in [*test, *validation, *train]}) == 400
    obeys = lambda text: task.verify(test[0], text).content  # noqa: E731
    assert obeys("- one\n- two") == obeys(" - one\n\n- two\n") == 1.0
    assert obeys("one") == obeys("- one\ntwo") == obeys("") == obeys("-") == 0.0
    with pytest.raises(ValueError, match=r"task\.n_train=200 goes beyond the 176 training instructions"):
        InstructionTask(n_train=200, spare=72).examples("train")
