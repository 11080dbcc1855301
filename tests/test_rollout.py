"""Rollouts: the log-probabilities are those of the sampling distribution, lengths come from EOS, randomness is derived."""

import pytest
import torch

from opd_lightning.data import encode_chat
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout import DatasetRollout, StudentRollout
from opd_lightning.rollout.generate import Sampling, generate
from opd_lightning.tasks.world import WorldTask
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
    source = student.read(join(rollout.prompts.ids, rollout.ids, rollout.lengths, 0))
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
        ids, lengths, truncated, _ = generate(student.lm, [[3]] * 64, Sampling(30), eos=[1], pad=1)
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
