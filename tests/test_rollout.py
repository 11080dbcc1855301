"""Rollouts: the log-probabilities are those of the sampling distribution, lengths come from EOS, randomness is derived."""

import pytest
import torch

from opd_lightning.data.renderer import encode_chat
from opd_lightning.generation.transformers import Sampling, generate
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout import DatasetRollout, MixtureRollout, StudentRollout, TeacherRollout
from opd_lightning.teachers import External, Live, Scorer
from opd_lightning.teachers.contexts import NoContext, Quote
from opd_lightning.toy.world import WorldTask
from opd_lightning.types import Prompts, join


@pytest.fixture(scope="module")
def student(tiny):
    return Student(Pretrained(tiny).model()).train()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Pretrained(tiny).tokenizer()


def prompts(tokenizer, n=6) -> Prompts:
    """Prompts of different lengths, so that left padding matters."""
    examples = WorldTask().examples("train")[:n]
    ids = [encode_chat(tokenizer, e.messages)[: 3 + i] for i, e in enumerate(examples)]
    return Prompts(list(examples), ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 5}, {"temperature": 1.3, "top_p": 0.8}])
def test_recorded_log_probabilities_are_those_of_the_sampling_distribution(student, tokenizer, options):
    """Against a fresh forward pass on the joined sequences, without cache, without padding on the left."""
    rollout = StudentRollout(tokenizer, 20, **options)(student, prompts(tokenizer), seed=3)
    source = student.read([join(rollout.prompts.ids, rollout.ids, rollout.lengths, 0)])
    logits = source.project(source.hidden)
    ids = rollout.ids[rollout.mask]
    for warper in Sampling(20, **options).warpers():
        logits = warper(None, logits)
    expected = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(rollout.logprobs[rollout.mask], expected, rtol=1e-4, atol=1e-4)
    assert (rollout.logprobs[~rollout.mask] == 0).all()


def test_equal_seeds_give_equal_completions_and_leave_the_global_stream_alone(student, tokenizer):
    policy = StudentRollout(tokenizer, 12, samples_per_prompt=2)
    before = torch.get_rng_state()
    a, b, c = (policy(student, prompts(tokenizer), seed) for seed in (1, 1, 2))
    assert torch.equal(a.ids, b.ids) and not (a.ids.shape == c.ids.shape and torch.equal(a.ids, c.ids))
    assert torch.equal(before, torch.get_rng_state())


def test_generation_leaves_train_mode_and_the_models_own_config_as_they_were(student, tokenizer):
    config = student.lm.generation_config
    StudentRollout(tokenizer, 4)(student, prompts(tokenizer), seed=0)
    assert student.training and student.lm.training and student.lm.generation_config is config


def test_generate_refuses_train_mode(student, tokenizer):
    with pytest.raises(AssertionError, match="eval mode"):
        generate(student.lm.train(), [[3]], Sampling(2), [1], 0)


def test_lengths_end_at_eos_even_where_pad_is_eos(student, tokenizer):
    """SmolLM2 pads with EOS: a mask by pad id would drop the EOS that the student must learn."""
    student.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        done = generate(student.lm, [[3]] * 64, Sampling(30), eos=[1], pad=1)
    ids, lengths, truncated = done.ids, done.lengths, done.truncated
    student.train()
    assert (not truncated.all() and truncated.any()) or lengths.max() < 30
    for row, n, cut in zip(ids.tolist(), lengths.tolist(), truncated.tolist(), strict=True):
        assert 1 not in row[: n - 1]
        assert cut == (row[n - 1] != 1) and (n == len(row) or not cut)


def test_samples_of_a_prompt_are_adjacent(student, tokenizer):
    rollout = StudentRollout(tokenizer, 4, samples_per_prompt=3)(student, prompts(tokenizer, 2), seed=0)
    assert [e.id for e in rollout.prompts.examples] == [e.id for e in prompts(tokenizer, 2).examples for _ in range(3)]


@pytest.mark.parametrize("truncated", ["keep", "mask"])
def test_truncated_completions_are_kept_or_left_out(student, tokenizer, truncated):
    rollout = StudentRollout(tokenizer, 2, truncated=truncated)(student, prompts(tokenizer), seed=0)
    assert rollout.truncated.any()
    assert torch.equal(rollout.counts, ~rollout.truncated if truncated == "mask" else torch.ones_like(rollout.truncated))


def test_reference_completions_end_with_eos_and_say_when_they_were_cut(student, tokenizer):
    examples = WorldTask().examples("train")[:3]
    batch = Prompts(list(examples), [encode_chat(tokenizer, e.messages) for e in examples])
    whole = DatasetRollout(tokenizer, 50)(student, batch, 0)
    assert (whole.ids.gather(1, whole.lengths[:, None] - 1) == tokenizer.eos_token_id).all() and not whole.truncated.any()
    assert whole.texts(tokenizer) == [e.completion for e in examples]
    assert DatasetRollout(tokenizer, 4)(student, batch, 0).truncated.all()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"updates_per_rollout": 0}, "updates_per_rollout"),
        ({"truncated": "drop"}, "truncated"),
    ],
)
def test_bad_options_are_refused_by_name(tokenizer, options, field):
    with pytest.raises(ValueError, match=rf"rollout\.{field}="):
        StudentRollout(tokenizer, 4, **options)


def teacher(tokenizer, other, context=None, weights=None) -> dict[str, Scorer]:
    weights = weights or External(other, tokenizer)
    scorer = Scorer(weights, context or NoContext(), tokenizer)
    return {"teacher": scorer}


def attached(scorers, student) -> dict[str, Scorer]:
    for scorer in scorers.values():
        scorer.weights.attach(student)
    return scorers


def test_the_teacher_writes_what_it_would_write_by_itself(student, tokenizer, other):
    """Greedily, behind its own prompt: equal to decoding the other model directly."""
    batch = prompts(tokenizer, 3)
    shown = Quote("demonstration", "{prompt} [ {demonstration} ]")
    scorers = attached(teacher(tokenizer, other, shown), student)
    rollout = TeacherRollout(tokenizer, 6, temperature=0.0)(student, batch, 0, scorers)
    lm = Pretrained(other).model()
    for b, example in enumerate(batch.examples):
        ids = encode_chat(tokenizer, shown(example))
        done = generate(lm, [ids], Sampling(6, temperature=0.0), [1], 0)
        assert rollout.ids[b, : rollout.lengths[b]].tolist() == done.rows()[0]
    assert rollout.prompts.ids == batch.ids and set(rollout.writers) == {"teacher"} and rollout.logprobs is None


def test_what_a_fixed_teacher_wrote_is_read_again_even_by_another_process(student, tokenizer, other, tmp_path):
    scorers = attached(teacher(tokenizer, other), student)
    policy = TeacherRollout(tokenizer, 6, tmp_path, samples_per_prompt=2)
    first = policy(student, prompts(tokenizer, 4), 1, scorers)
    again = policy(student, prompts(tokenizer, 4), 2, scorers)
    later = TeacherRollout(tokenizer, 6, tmp_path, samples_per_prompt=2)(student, prompts(tokenizer, 4), 3, scorers)
    for rollout in (again, later):
        assert torch.equal(rollout.ids, first.ids) and torch.equal(rollout.lengths, first.lengths)
        assert torch.equal(rollout.truncated, first.truncated) and rollout.teacher_tokens == 0 < first.teacher_tokens
    rows = scorers["teacher"].prompt_ids(first.prompts)
    assert first.teacher_tokens == sum(map(len, rows)) + int(first.lengths.sum())


def test_half_a_line_of_a_killed_process_is_drawn_again(student, tokenizer, other, tmp_path):
    scorers = attached(teacher(tokenizer, other), student)
    first = TeacherRollout(tokenizer, 6, tmp_path)(student, prompts(tokenizer, 4), 1, scorers)
    file = next(tmp_path.rglob("rank-0.jsonl"))
    file.write_text(file.read_text()[:-20])
    again = TeacherRollout(tokenizer, 6, tmp_path)(student, prompts(tokenizer, 4), 1, scorers)
    assert torch.equal(again.ids, first.ids) and again.teacher_tokens == first.teacher_tokens


def test_a_teacher_that_moves_writes_anew(student, tokenizer, other, tmp_path):
    scorers = attached(teacher(tokenizer, other, weights=Live()), student)
    policy = TeacherRollout(tokenizer, 12, tmp_path)
    a, b = (policy(student, prompts(tokenizer), seed, scorers) for seed in (1, 2))
    assert a.teacher_tokens > 0 < b.teacher_tokens and not list(tmp_path.rglob("*.jsonl"))
    assert a.ids.shape != b.ids.shape or not torch.equal(a.ids, b.ids)


def test_a_mixture_keeps_each_prompt_with_its_completion(student, tokenizer):
    """In the order of the prompts, the data set's rows are the references, and the shares are about as asked."""
    batch = prompts(tokenizer, 40)
    policy = MixtureRollout(tokenizer, DatasetRollout(tokenizer, 30), 0.5, 30)
    rollout = policy(student, batch, 5, {})
    assert rollout.prompts.ids == batch.ids and rollout.prompts.examples == batch.examples
    texts = rollout.texts(tokenizer)
    for example, text, writer in zip(batch.examples, texts, rollout.writers, strict=True):
        assert writer in ("student", "dataset") and (text == example.completion) == (writer == "dataset")
    assert 10 <= rollout.writers.count("student") <= 30
    again = policy(student, batch, 5, {})
    assert torch.equal(again.ids, rollout.ids)
    for share, writer in ((0.0, "dataset"), (1.0, "student")):
        assert set(MixtureRollout(tokenizer, DatasetRollout(tokenizer, 30), share, 30)(student, batch, 0, {}).writers) == {
            writer
        }


def test_a_mixture_keeps_samples_of_a_prompt_together(student, tokenizer, other):
    scorers = attached(teacher(tokenizer, other), student)
    batch = prompts(tokenizer, 8)
    policy = MixtureRollout(tokenizer, TeacherRollout(tokenizer, 5, samples_per_prompt=3), 0.5, 5, samples_per_prompt=3)
    rollout = policy(student, batch, 1, scorers)
    assert [e.id for e in rollout.prompts.examples] == [e.id for e in batch.examples for _ in range(3)]
    assert all(len(set(rollout.writers[i : i + 3])) == 1 for i in range(0, 24, 3)) and len(set(rollout.writers)) == 2


def test_mixtures_that_cannot_be_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"rollout\.share=1\.5"):
        MixtureRollout(tokenizer, DatasetRollout(tokenizer, 4), 1.5, 4)
    with pytest.raises(ValueError, match=r"rollout\.samples_per_prompt=2"):
        MixtureRollout(tokenizer, DatasetRollout(tokenizer, 4), 0.5, 4, samples_per_prompt=2)
