"""Rollouts: the log-probabilities are those of the sampling distribution, lengths come from EOS, randomness is derived."""

import pytest
import torch

from opd_lightning.data.batching import collate
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.generation.transformers import TransformersGenerator, decode, warpers
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout import DatasetRollout, MixtureRollout, StudentRollout, TeacherRollout
from opd_lightning.teachers import LocalTeacher, external, live
from opd_lightning.teachers.contexts import NoContext, PrivilegedContext
from opd_lightning.toy.world import WorldTask
from opd_lightning.types import Prompts, Rendered, Rollout, SamplingParams


@pytest.fixture(scope="module")
def student(tiny):
    return Student(Pretrained(tiny).model()).train()


@pytest.fixture(scope="module")
def renderer(tiny) -> ChatRenderer:
    return ChatRenderer(Pretrained(tiny).tokenizer())


@pytest.fixture(scope="module")
def generator(student, renderer) -> TransformersGenerator:
    engine = TransformersGenerator(renderer.tokenizer)
    engine.update_weights(student, 0)
    return engine


def prompts(renderer, n=6) -> Prompts:
    """Prompts of different lengths, so that left padding matters."""
    examples = WorldTask().examples("train")[:n]
    return Prompts(examples, [Rendered(renderer.render(e.messages).token_ids[: 3 + i]) for i, e in enumerate(examples)])


def ids(rollout: Rollout) -> list[list[int]]:
    """What was written."""
    return [sample.completion_ids for sample in rollout.samples]


def read(rollout: Rollout) -> list[list[int]]:
    """The student's prompts."""
    return [sample.token_ids[: sample.prompt_length].tolist() for sample in rollout.samples]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 5}, {"temperature": 1.3, "top_p": 0.8}])
def test_recorded_log_probabilities_are_those_of_the_sampling_distribution(student, renderer, generator, options):
    """Against a fresh forward pass on the joined sequences, without cache, without padding on the left."""
    samples = StudentRollout(renderer, SamplingParams(20, **options))(prompts(renderer), 3, generator, {}).samples
    logits = student.read([collate(samples, 0, student.lm.device)]).chunk(slice(None)).logits
    written = torch.cat([sample.token_ids[sample.loss_mask] for sample in samples])
    for warper in warpers(SamplingParams(20, **options)):
        logits = warper(None, logits)
    expected = logits.log_softmax(-1).gather(1, written[:, None]).squeeze(1)
    found = torch.cat([sample.logprobs[sample.loss_mask] for sample in samples])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all((sample.logprobs[~sample.loss_mask] == 0).all() for sample in samples)


def test_equal_seeds_give_equal_completions_and_leave_the_global_stream_alone(renderer, generator):
    policy = StudentRollout(renderer, SamplingParams(12), num_generations=2)
    before = torch.get_rng_state()
    a, b, c = (ids(policy(prompts(renderer), seed, generator, {})) for seed in (1, 1, 2))
    assert a == b != c
    assert torch.equal(before, torch.get_rng_state())


def test_generation_leaves_train_mode_and_the_models_own_config_as_they_were(student, renderer, generator):
    config = student.lm.generation_config
    StudentRollout(renderer, SamplingParams(4))(prompts(renderer), 0, generator, {})
    assert student.training and student.lm.training and student.lm.generation_config is config


def test_generate_refuses_train_mode(student):
    with pytest.raises(AssertionError, match="eval mode"):
        decode(student.lm.train(), [[3]], SamplingParams(2), [1], 0)


def test_lengths_end_at_eos_even_where_pad_is_eos(student):
    """SmolLM2 pads with EOS: a mask by pad id would drop the EOS that the student must learn."""
    student.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        done = decode(student.lm, [[3]] * 64, SamplingParams(30), eos=[1], pad=1)
    student.train()
    truncated = [completion.finish_reason == "length" for completion in done]
    assert (not all(truncated) and any(truncated)) or max(len(completion.token_ids) for completion in done) < 30
    for completion, cut in zip(done, truncated, strict=True):
        row = completion.token_ids
        assert 1 not in row[:-1] and len(completion.logprobs) == len(row)
        assert cut == (row[-1] != 1) and (len(row) == 30 or not cut)


def test_samples_of_a_prompt_are_adjacent(renderer, generator):
    samples = StudentRollout(renderer, SamplingParams(4), num_generations=3)(prompts(renderer, 2), 0, generator, {}).samples
    assert [s.example.id for s in samples] == [e.id for e in prompts(renderer, 2).examples for _ in range(3)]
    assert [s.group for s in samples] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("mask", [False, True])
def test_truncated_completions_are_kept_or_left_out(renderer, generator, mask):
    samples = StudentRollout(renderer, SamplingParams(2), mask_truncated_completions=mask)(
        prompts(renderer), 0, generator, {}
    ).samples
    cut = [sample.finish_reason == "length" for sample in samples]
    assert any(cut)
    assert [sample.include_in_loss for sample in samples] == [not (mask and c) for c in cut]


def test_reference_completions_end_with_eos_and_say_when_they_were_cut(renderer):
    examples = WorldTask().examples("train")[:3]
    batch = Prompts(examples, [renderer.render(e.messages) for e in examples])
    whole = DatasetRollout(renderer, SamplingParams(50))(batch, 0)
    assert all(row[-1] == renderer.tokenizer.eos_token_id for row in ids(whole))
    assert all(sample.finish_reason == "stop" for sample in whole.samples)
    assert renderer.decode_all(ids(whole)) == [e.completion for e in examples]
    assert all(sample.finish_reason == "length" for sample in DatasetRollout(renderer, SamplingParams(4))(batch, 0).samples)


@pytest.mark.parametrize(
    ("sampling", "options", "field"),
    [
        ({"temperature": 0.0}, {}, r"rollout\.sampling\.temperature="),
        ({"temperature": -1.0}, {}, "temperature="),
        ({"top_p": 0.0}, {}, "top_p="),
        ({"top_k": -1}, {}, "top_k="),
        ({}, {"num_generations": 0}, r"rollout\.num_generations="),
        ({}, {"num_iterations": 0}, r"rollout\.num_iterations="),
    ],
)
def test_bad_options_are_refused_by_name(renderer, sampling, options, field):
    with pytest.raises(ValueError, match=field):
        StudentRollout(renderer, SamplingParams(4, **sampling), **options)


def teachers(student, renderer, teacher: LocalTeacher) -> dict[str, LocalTeacher]:
    """A teacher that is ready."""
    teacher.check_tokenizer(renderer.tokenizer)
    teacher.setup(student, renderer)
    return {"teacher": teacher}


def test_the_teacher_writes_what_it_would_write_by_itself(student, renderer, generator, other):
    """Greedily, behind its own prompt: equal to decoding the other model directly."""
    batch = prompts(renderer, 3)
    shown = PrivilegedContext("demonstration", "{prompt} [ {demonstration} ]")
    known = teachers(student, renderer, external(other, context=shown))
    rollout = TeacherRollout(SamplingParams(6, temperature=0.0))(batch, 0, generator, known)
    lm = Pretrained(other).model()
    for sample, example in zip(rollout.samples, batch.examples, strict=True):
        done = decode(lm, [renderer.render(shown(example)).token_ids], SamplingParams(6, temperature=0.0), [1], 0)
        assert sample.completion_ids == done[0].token_ids and sample.example is example
    assert read(rollout) == [prompt.token_ids for prompt in batch.rendered]
    assert {s.source for s in rollout.samples} == {"teacher"} and all(s.logprobs is None for s in rollout.samples)


def test_what_a_fixed_teacher_wrote_is_read_again_even_by_another_process(student, renderer, generator, other, tmp_path):
    known = teachers(student, renderer, external(other, context=NoContext()))
    policy, batch = TeacherRollout(SamplingParams(6), tmp_path, num_generations=2), prompts(renderer, 4)
    first = policy(batch, 1, generator, known)
    again = policy(batch, 2, generator, known)
    later = TeacherRollout(SamplingParams(6), tmp_path, num_generations=2)(batch, 3, generator, known)
    for rollout in (again, later):
        assert ids(rollout) == ids(first) and rollout.teacher_cost.tokens == 0 < first.teacher_cost.tokens
        assert [s.finish_reason for s in rollout.samples] == [s.finish_reason for s in first.samples]
    rows = [prompt for prompt in known["teacher"].prompts(batch.examples) for _ in range(2)]
    assert first.teacher_cost.tokens == sum(len(prompt.token_ids) for prompt in rows) + sum(map(len, ids(first)))


def test_half_a_line_of_a_killed_process_is_drawn_again(student, renderer, generator, other, tmp_path):
    known = teachers(student, renderer, external(other))
    first = TeacherRollout(SamplingParams(6), tmp_path)(prompts(renderer, 4), 1, generator, known)
    file = next(tmp_path.rglob("rank-0.jsonl"))
    file.write_text(file.read_text()[:-20])
    again = TeacherRollout(SamplingParams(6), tmp_path)(prompts(renderer, 4), 1, generator, known)
    assert ids(again) == ids(first) and again.teacher_cost == first.teacher_cost


def test_a_teacher_that_moves_writes_anew(student, renderer, generator, tmp_path):
    known = teachers(student, renderer, live())
    policy = TeacherRollout(SamplingParams(12), tmp_path)
    a, b = (policy(prompts(renderer), seed, generator, known) for seed in (1, 2))
    assert a.teacher_cost.tokens > 0 < b.teacher_cost.tokens and not list(tmp_path.rglob("*.jsonl"))
    assert ids(a) != ids(b)


def test_a_mixture_keeps_each_prompt_with_its_completion(renderer, generator):
    """In the order of the prompts, the data set's rows are the references, and the shares are about as asked."""
    batch = prompts(renderer, 40)
    policy = MixtureRollout(renderer, DatasetRollout(renderer, SamplingParams(30)), 0.5, SamplingParams(30))
    rollout = policy(batch, 5, generator, {})
    assert read(rollout) == [prompt.token_ids for prompt in batch.rendered]
    assert [s.example for s in rollout.samples] == batch.examples and [s.group for s in rollout.samples] == list(range(40))
    writers = [s.source for s in rollout.samples]
    for example, text, writer in zip(batch.examples, renderer.decode_all(ids(rollout)), writers, strict=True):
        assert writer in ("student", "dataset") and (text == example.completion) == (writer == "dataset")
    assert 10 <= writers.count("student") <= 30
    again = policy(batch, 5, generator, {})
    assert ids(again) == ids(rollout)
    for share, writer in ((0.0, "dataset"), (1.0, "student")):
        rollout = MixtureRollout(renderer, DatasetRollout(renderer, SamplingParams(30)), share, SamplingParams(30))(
            batch, 0, generator, {}
        )
        assert {s.source for s in rollout.samples} == {writer}


def test_a_mixture_keeps_samples_of_a_prompt_together(student, renderer, generator, other):
    known = teachers(student, renderer, external(other))
    batch = prompts(renderer, 8)
    policy = MixtureRollout(
        renderer, TeacherRollout(SamplingParams(5), num_generations=3), 0.5, SamplingParams(5), num_generations=3
    )
    samples = policy(batch, 1, generator, known).samples
    assert [s.example.id for s in samples] == [e.id for e in batch.examples for _ in range(3)]
    assert [s.group for s in samples] == [i for i in range(8) for _ in range(3)]
    writers = [s.source for s in samples]
    assert all(len(set(writers[i : i + 3])) == 1 for i in range(0, 24, 3)) and len(set(writers)) == 2


def test_mixtures_that_cannot_be_are_refused(renderer):
    with pytest.raises(ValueError, match=r"rollout\.share=1\.5"):
        MixtureRollout(renderer, DatasetRollout(renderer, SamplingParams(4)), 1.5, SamplingParams(4))
    with pytest.raises(ValueError, match=r"rollout\.num_generations=2"):
        MixtureRollout(renderer, DatasetRollout(renderer, SamplingParams(4)), 0.5, SamplingParams(4), num_generations=2)
