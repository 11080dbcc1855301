"""What the contracts carry: routed, mixed and top-k teachers and conversations, against plain autograd on full logits."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.config import compose
from opd_lightning.config.compatibility import check
from opd_lightning.data.batching import Batch, collate, pack
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.environments import Calculator, SingleTurn
from opd_lightning.environments.calculator import calculate
from opd_lightning.generation import TransformersGenerator
from opd_lightning.losses import Objective
from opd_lightning.losses.divergences import forward_kl, reverse_kl
from opd_lightning.losses.targets import TopKLogProbs, TopKScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout import StudentRollout
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers import BaseTeacher, MixedTeacher, RoutedTeacher, TopKTeacher, external, frozen
from opd_lightning.toy.world import WorldTask, world_tokenizer
from opd_lightning.training.run import run
from opd_lightning.types import Completion, Example, Prompts, Rendered, Sample, SamplingParams, Verdict
from tests.test_commands import call, tiny_run  # noqa: F401


@pytest.fixture
def student(tiny) -> Student:
    """A random model, chunks of few rows."""
    return Student(Pretrained(tiny).model(), chunk=5)


@pytest.fixture
def renderer() -> ChatRenderer:
    """The world's."""
    return ChatRenderer(world_tokenizer())


def samples(renderer: ChatRenderer, gaps: bool = False) -> list[Sample]:
    """Four samples of two skills, of different length; with gaps, the second and third token are an environment's."""
    found = []
    for i, text in enumerate(("answer 3 1", "result 4 , 4 done", "9 9 9", "answer 0 1 2 3 4")):
        example = Example(str(i), [{"role": "user", "content": f"rotate {i} 1 2"}], skill=("new", "prior/sort")[i % 2])
        prompt, ids = renderer.render(example.messages).token_ids, renderer.reply(text)
        mask = [False] * len(prompt) + [not (gaps and at in (1, 2)) for at in range(len(ids))]
        found.append(Sample(example, i, torch.tensor(prompt + ids), torch.tensor(mask), len(prompt), "student", "stop"))
    return found


def log_probs(lm, sample: Sample) -> torch.Tensor:
    """Log-probabilities [n, V] behind which the sample's trainable tokens stand, from one plain forward pass."""
    at = sample.loss_mask.nonzero().squeeze(1) - 1
    return lm(input_ids=sample.token_ids[None]).logits[0, at].log_softmax(-1)


def gradients(student: Student) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def by_package(student: Student, teacher, some: list[Sample], divergence, support, renderer) -> torch.Tensor:
    """Gradients by way of scores, chunks and micro-batches."""
    objective = Objective(completion_mask, token_mean, divergence=divergence, vocab_support=support)
    teacher.setup(student, renderer)
    tokens, scores = pack(some, torch.device("cpu")), {"teacher": teacher.score(some, max_tokens=30)}
    weight, normaliser = objective.weights(tokens, len(some), scores["teacher"].valid)
    batch = Batch(some, replace(tokens, weight=weight / normaliser), scores, False, [0, 1, 2, 3])
    student.zero_grad()
    for rows in ([3, 1], [2], [0]):
        sequences, part, known = batch.micro(rows, 0)
        student(sequences, part, known, objective)[0].backward()
    return gradients(student)


def by_autograd(student: Student, targets, some: list[Sample], term) -> torch.Tensor:
    """The same from the mean over trainable tokens of term(log_s, target of a sample, sample)."""
    student.zero_grad()
    total = sum(term(log_probs(student.lm, s), targets(s), s).sum() for s in some)
    (total / sum(s.trainable for s in some)).backward()
    return gradients(student)


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Equal to 1e-5, relative to the whole gradient."""
    return bool((found - exact).norm() <= 1e-5 * exact.norm()) and exact.norm() > 1e-3


def kl(log_s, log_t, _):
    """Reverse KL."""
    return (log_s.exp() * (log_s - log_t)).sum(-1)


@pytest.mark.parametrize("gaps", [False, True])
def test_a_routed_teacher_is_each_samples_own(student, renderer, tiny, other, narrow, gaps):
    some = samples(renderer, gaps)
    one, two = (Pretrained(path).model() for path in (other, narrow[1]))
    teacher = RoutedTeacher({"new": external(other), "prior": external(narrow[1])})
    with torch.no_grad():
        targets = {s.example.id: log_probs(one if s.example.skill == "new" else two, s) for s in some}
    exact = by_autograd(student, lambda s: targets[s.example.id], some, kl)
    assert close(by_package(student, teacher, some, reverse_kl, FullVocabulary(), renderer), exact)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("space", ["probability", "log"])
def test_a_mixed_teacher_is_the_average(student, renderer, other, narrow, space, gaps):
    some = samples(renderer, gaps)
    models = [Pretrained(path).model() for path in (other, narrow[1])]
    teacher = MixedTeacher({"a": external(other), "b": external(narrow[1])}, {"a": 3.0, "b": 1.0}, space)

    def target(s: Sample) -> torch.Tensor:
        a, b = (log_probs(lm, s) for lm in models)
        return (0.75 * a.exp() + 0.25 * b.exp()).log() if space == "probability" else (0.75 * a + 0.25 * b).log_softmax(-1)

    with torch.no_grad():
        targets = {s.example.id: target(s) for s in some}
    exact = by_autograd(student, lambda s: targets[s.example.id], some, kl)
    assert close(by_package(student, teacher, some, reverse_kl, FullVocabulary(), renderer), exact)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("gaps", [False, True])
def test_a_top_k_teacher_teaches_what_the_teacher_does(student, renderer, other, tail, gaps):
    """The view gives the gradients of the whole teacher under the same support, and those of plain autograd."""
    some, lm = samples(renderer, gaps), Pretrained(other).model()
    whole = by_package(student, external(other), some, forward_kl, TopK(4, tail_bucket=tail), renderer)
    assert close(
        by_package(student, TopKTeacher(external(other), 6), some, forward_kl, TopK(4, tail_bucket=tail), renderer), whole
    )

    def term(log_s, log_t, _):
        top = log_t.topk(4, -1).indices
        parts = []
        for log_p in (log_s, log_t):
            chosen = log_p.gather(-1, top)
            outside = (1 - chosen.exp().sum(-1, keepdim=True)).log()
            parts.append(torch.cat([chosen, outside], -1) if tail else chosen.log_softmax(-1))
        s, t = parts
        return (t.exp() * (t - s)).sum(-1)

    with torch.no_grad():
        targets = {s.example.id: log_probs(lm, s) for s in some}
    assert close(whole, by_autograd(student, lambda s: targets[s.example.id], some, term))


def test_a_top_k_teacher_knows_the_written_token(student, renderer, other):
    some = samples(renderer)
    exact = by_package(student, external(other), some, reverse_kl, SampledToken(), renderer)
    assert close(by_package(student, TopKTeacher(external(other), 2), some, reverse_kl, SampledToken(), renderer), exact)


def test_teachers_of_teachers(student, renderer, other, narrow):
    """A mixture of a routed teacher and a top-k view of none: what is made of parts is a part again."""
    routed = RoutedTeacher({"new": external(other), "prior": external(narrow[1])})
    alone = by_package(student, routed, samples(renderer), reverse_kl, FullVocabulary(), renderer)
    mixed = MixedTeacher({"a": routed, "b": routed})
    assert close(by_package(student, mixed, samples(renderer), reverse_kl, FullVocabulary(), renderer), alone)
    assert len(mixed.parts) == 4 and mixed.frozen and not mixed.writes
    with pytest.raises(ValueError, match="gives no whole vocabulary"):
        TopKTeacher(TopKTeacher(routed, 3), 2)


def test_an_equal_teacher_gives_no_gradient(student, renderer):
    """A mixture of copies of the student is the student."""
    mixed = MixedTeacher({"a": frozen(), "b": frozen()}, space="log")
    assert by_package(student, mixed, samples(renderer), reverse_kl, FullVocabulary(), renderer).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RoutedTeacher({}), "teacher.teachers is empty"),
        (lambda: RoutedTeacher({"a": frozen()}, default="b"), r"teacher.default=b is none of teacher.teachers \(a\)"),
        (lambda: MixedTeacher({"a": frozen()}, {"b": 1.0}), "teacher.weights=.*must give each of"),
        (lambda: MixedTeacher({"a": frozen()}, {"a": 0.0}), "a positive number"),
        (lambda: MixedTeacher({"a": frozen()}, space="logit"), "teacher.space='logit' is unknown"),
        (lambda: TopKTeacher(frozen(), 0), "teacher.k=0 must be at least 1"),
        (lambda: RoutedTeacher({"prior": frozen()}).route(Example("7", [], skill="new")), "example 7 has skill='new'.*default"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_routes():
    teacher = RoutedTeacher({"math": frozen(), "prior": frozen()}, by="field", default="prior")
    assert teacher.route(Example("1", [], extra={"field": "math"})) == "math"
    assert teacher.route(Example("2", [], extra={})) == "prior"
    assert RoutedTeacher({"prior": frozen()}).route(Example("3", [], skill="prior/sort")) == "prior"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=opd", "teacher=topk"], "FullVocabulary reads of the teacher its whole vocabulary.*gives its most probable"),
        (["method=opd_topk", "teacher=topk", "loss.vocab_support.of=student"], "reads of the teacher its whole vocabulary"),
        (
            ["method=opd_topk", "teacher=topk", "teacher.k=4", "loss.vocab_support.k=8"],
            "loss.vocab_support.k=8 exceeds the 4 tokens",
        ),
        (
            ["method=opd_sampled", "teacher=topk", "loss.vocab_support.baseline=true"],
            "reads of the teacher its whole vocabulary",
        ),
        (["method=opd_topk", "teacher=topk", "loss.temperature=2"], "loss.temperature=2 needs a teacher of the whole"),
        (["method=seqkd", "teacher=mixed"], "can only score"),
        (["method=sft", "environment=calculator"], "environment=.*rollout=DatasetRollout"),
    ],
)
def test_what_a_teacher_cannot_provide_is_refused_before_anything_is_loaded(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(compose(overrides))


@pytest.mark.parametrize("method", ["opd_topk", "opd_sampled"])
def test_a_run_with_a_top_k_teacher(small, method):
    folder = run(
        small(
            f"method={method}", "teacher=topk", "teacher.k=16", "loss.vocab_support.k=8" if method == "opd_topk" else "seed=0"
        )
    )
    row = read_csv(folder / "metrics.csv")[-1]
    assert "train/reverse_kl_topk" in row and "train/reverse_kl" not in row and row["train/loss"] != 0


# Environments


class Scripted:
    """A generator that writes what it is told, and remembers what it was asked."""

    def __init__(self, renderer: ChatRenderer, replies: list[str]):
        self.renderer, self.replies, self.asked = renderer, list(replies), []

    def generate(self, prompts, sampling, seed, model=None):
        self.asked.append([prompt.token_ids for prompt in prompts])
        ids = [self.renderer.reply(self.replies.pop(0)) for _ in prompts for _ in range(sampling.n)]
        return [Completion(row, "stop", [-1.0] * len(row)) for row in ids]


class Judge:
    """A verifier: right is what says 7."""

    verifies = True

    def verify(self, example, text):
        return Verdict(float("7" in text))


def test_a_conversation_is_what_the_template_says_and_the_calculators_tokens_are_not_trained_on(renderer):
    example = Example("1", [{"role": "user", "content": "rotate 3 4"}])
    generator = Scripted(renderer, ["3", "answer 7"])
    rollout = StudentRollout(renderer, SamplingParams(20), environment=partial(Calculator, Judge()))
    (sample,) = rollout(Prompts([example], [renderer.render(example.messages)]), 0, generator, {}).samples
    chat = [*example.messages, {"role": "assistant", "content": "3"}, {"role": "user", "content": "3"}]
    assert sample.token_ids.tolist() == [*renderer.render(chat).token_ids, *renderer.reply("answer 7")]
    assert renderer.decode(sample.token_ids[sample.loss_mask]) == "3 answer 7"
    assert sample.trainable == len(renderer.reply("3")) + len(renderer.reply("answer 7"))
    assert (
        sample.verdict.content == 1.0 and sample.finish_reason == "stop" and sample.prompt_length == len(generator.asked[0][0])
    )
    assert sample.logprobs[sample.loss_mask].tolist() == [-1.0] * sample.trainable
    assert generator.asked[1][0] == renderer.render(chat).token_ids


def test_episodes_of_different_length_go_on_side_by_side(renderer):
    class UntilSeven:
        def reset(self, example):
            return example.messages

        def step(self, reply):
            return ([], Verdict(1.0)) if "7" in reply else ([{"role": "user", "content": "red"}], None)

    some = [Example(str(i), [{"role": "user", "content": f"rotate {i}"}]) for i in range(2)]
    generator = Scripted(renderer, ["7", "1", "2", "7"])
    rollout = StudentRollout(renderer, SamplingParams(20), environment=UntilSeven)
    first, second = rollout(Prompts(some, [renderer.render(e.messages) for e in some]), 0, generator, {}).samples
    assert [len(asked) for asked in generator.asked] == [2, 1, 1]
    assert renderer.decode(first.token_ids[first.loss_mask]) == "7" and first.verdict.content == 1.0
    assert renderer.decode(second.token_ids[second.loss_mask]) == "1 2 7" and (first.group, second.group) == (0, 1)


def test_an_episode_ends_at_the_limit_of_its_tokens(renderer):
    example = Example("1", [{"role": "user", "content": "rotate 3 4"}])
    rollout = StudentRollout(
        renderer, SamplingParams(3), environment=partial(Calculator, Judge()), mask_truncated_completions=True
    )
    (sample,) = rollout(
        Prompts([example], [renderer.render(example.messages)]), 0, Scripted(renderer, ["3", "answer 7 1"]), {}
    ).samples
    assert sample.trainable == 3 and sample.finish_reason == "length" and sample.verdict is None and not sample.include_in_loss
    assert bool(sample.loss_mask[-1])


def test_one_turn_is_the_rollout_without_an_environment(student, renderer):
    generator = TransformersGenerator(renderer.tokenizer)
    generator.update_weights(student, 0)
    task = WorldTask(n_train=4, n_eval=4)
    some = list(task.examples("train"))[:3]
    prompts = Prompts(some, [renderer.render(e.messages) for e in some])
    plain = StudentRollout(renderer, SamplingParams(6), num_generations=2)(prompts, 7, generator, {}).samples
    single = StudentRollout(renderer, SamplingParams(6), num_generations=2, environment=partial(SingleTurn, task))
    for a, b in zip(plain, single(prompts, 7, generator, {}).samples, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.loss_mask, b.loss_mask) and a.group == b.group
        assert a.finish_reason == b.finish_reason and torch.equal(a.logprobs, b.logprobs)
        assert b.verdict is None if b.finish_reason == "length" else b.verdict is not None


def test_a_template_that_rewrites_earlier_turns_is_refused(renderer):
    tokenizer = world_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}= {{ m['content'] if loop.last else 'red' }} <eos> "
        "{% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        ChatRenderer(tokenizer).between([{"role": "user", "content": "1"}], "2", [{"role": "user", "content": "3"}])


@pytest.mark.parametrize(
    ("text", "value"),
    [("3 + 4*2", "11"), ("-3", "error"), ("2 ** 9", "error"), ("__import__('os')", "error"), ("", "error"), ("(1+", "error")],
)
def test_the_calculator(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize("method", ["grpo", "opd", "sdft"])
def test_a_run_in_an_environment(small, method):
    folder = run(small(f"method={method}", "environment=calculator", "rollout.sampling.max_new_tokens=8", "evaluation=none"))
    rows = read_csv(folder / "metrics.csv")
    assert len(rows) == 3 and all(row["rollout/length"] <= 8 for row in rows[1:])


def test_collating_behind_another_prompt_keeps_the_gaps(renderer):
    some = samples(renderer, gaps=True)
    prompt = renderer.render([{"role": "user", "content": "sort 1 2 3 4 5 6 7"}]).token_ids
    own, theirs = (collate(some, 0, torch.device("cpu"), p) for p in (None, [prompt] * len(some)))
    assert torch.equal(own.row, theirs.row)
    for b, sample in enumerate(some):
        at = theirs.column[theirs.row == b]
        assert theirs.input_ids[b, at + 1].tolist() == sample.token_ids[sample.loss_mask].tolist()
        assert theirs.input_ids[b, : len(prompt)].tolist() == prompt


def test_the_generators_samples_stand_together(student, renderer):
    generator = TransformersGenerator(renderer.tokenizer)
    generator.update_weights(student, 0)
    prompts = [Rendered([3, 4, 5]), Rendered([6])]
    done = generator.generate(prompts, SamplingParams(5, n=3), seed=1)
    assert done == generator.generate([prompts[0]] * 3 + [prompts[1]] * 3, SamplingParams(5), seed=1) and len(done) == 6


# Two devices


PLAYED = ["rollout._target_=tests.gapped.PlayedRollout", "rollout.sampling.max_new_tokens=24"]
TOP_K_PARTS = [f"teacher@teacher.teachers.{name}=topk" for name in ("new", "prior")] + ["teacher.teachers.new.k=20"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "case",
    [
        ["method=kd", "teacher=routed", "teacher.default=new"],
        ["method=kd", "teacher=mixed"],
        ["method=kd", "loss/vocab_support=topk", "teacher=topk"],
        ["method=kd", "loss/vocab_support=topk", "teacher=routed", "teacher.default=new", *TOP_K_PARTS],
        ["method=kd", "rollout._target_=tests.gapped.GappedRollout"],
        [*PLAYED, "method=grpo", "rollout.num_generations=4", "loss.policy_gradient.credit=return_to_go"],
        [*PLAYED, "method=sdft", "context=solution", "context.at=every"],
        [*PLAYED, "method=sdpo", "context=feedback", "context.at=every"],
    ],
    ids=["routed", "mixed", "topk", "routed topk", "gapped", "credit", "every", "feedback"],
)
def test_two_devices_train_like_one_on_every_contract(tiny, tiny_run, tmp_path, trainer, case):  # noqa: F811
    """Over gloo, on given completions: the same weights, losses and gradient norms."""
    base = [o for o in tiny_run if not re.match(r"trainer\.(max_steps|devices)|evaluation", o)]
    # With plain gradient descent the weights change by the gradients.
    base += [*case, "evaluation=none", "logger=none", "trainer.max_steps=3", "optim.clip_norm=null", "optim.lr=0.05"]
    base += ["optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas", "~optim.optimizer.fused"]
    for more in (
        ["study.name=one"],
        [f"trainer={trainer}", "trainer.devices=2", "max_tokens_per_microbatch=40", "study.name=two"],
    ):
        code, output = call(*base, *more)
        assert code == 0, output
    files = [next(tmp_path.glob(f"{name}/*/seed-0/checkpoints/last.ckpt")) for name in ("one", "two")]
    a, b = (torch.load(f, weights_only=True)["state_dict"] for f in files)
    start = {f"student.lm.{k}": v for k, v in AutoModelForCausalLM.from_pretrained(tiny).state_dict().items()}
    moved = torch.stack([(a[k] - start[k]).norm() for k in a if k in start]).norm()
    apart = torch.stack([(a[k] - b[k]).norm() for k in a]).norm()
    assert apart < 1e-5 * moved, (apart, moved)
    rows = [read_csv(f.parents[1] / "metrics.csv") for f in files]
    for name in ("train/grad_norm", "train/loss"):
        assert [r[name] for r in rows[0][1:]] == pytest.approx([r[name] for r in rows[1][1:]], rel=1e-4)


class Talkative:
    """An environment that answers every reply, at length."""

    def reset(self, example):
        return example.messages

    def step(self, reply):
        return [{"role": "user", "content": "1 2 3 4 5 6"}], None


def test_an_episode_ends_at_the_models_window(student, renderer):
    example = Example("1", [{"role": "user", "content": "rotate 3 4"}])
    prompts = Prompts([example], [renderer.render(example.messages)])
    rollout = StudentRollout(renderer, SamplingParams(60), environment=Talkative, window=30)
    (sample,) = rollout(prompts, 0, Scripted(renderer, ["1 2"] * 16), {}).samples
    assert 20 < len(sample.token_ids) <= 30 and sample.finish_reason == "length"


def test_a_gate_that_reads_verdicts_gets_them_without_rewards_in_the_loss(small):
    """Its function says so; the task judges every completion, and the loss stays a divergence."""
    folder = run(small("method=opd", "loss.gate={_target_: tests.test_contracts.wrong, _partial_: true}", "evaluation=none"))
    rows = read_csv(folder / "metrics.csv")
    assert [row["rollout/reward"] for row in rows[1:]] == [0.0, 0.0]  # the tiny model is never right
    assert [row["train/gate"] for row in rows[1:]] == [1.0, 1.0]


def wrong(log_s, targets, tokens):
    """A gate that is open where the answer was wrong."""
    return (1 - tokens.reward).to(log_s.dtype)


wrong.reads_verdicts = True  # type: ignore[attr-defined]


def test_prompts_that_are_more_than_text_are_refused(student, renderer, monkeypatch, small):
    real = ChatRenderer.render

    def render(self, messages, tools=None):
        return replace(real(self, messages, tools), model_inputs={"pixel_values": torch.ones(1)})

    monkeypatch.setattr(ChatRenderer, "render", render)
    with pytest.raises(ValueError, match="pixel_values beside their text"):
        run(small("method=opd", "evaluation=none"))


def test_an_unfinished_episode_is_judged_by_the_students_words_alone(student, renderer):
    """The calculator's 7 is no answer of the student's, whose last reply was cut off."""
    example = Example("1", [{"role": "user", "content": "rotate 3 4"}])
    prompts = Prompts([example], [renderer.render(example.messages)])
    rollout = StudentRollout(renderer, SamplingParams(4), environment=partial(Calculator, Judge()))
    (sample,) = rollout(prompts, 0, Scripted(renderer, ["7", "1 2 3 4"]), {}).samples
    assert sample.verdict is None and renderer.decode(sample.reply_ids) == "1 2"
    assert "7" in renderer.decode(sample.completion_ids)


@pytest.mark.parametrize("support", [TopK(2), SampledToken()], ids=["topk", "sampled"])
def test_what_is_not_valid_cannot_spoil_a_gradient(student, renderer, support):
    """A server's empty answers are NaN and -1; the other tokens learn as if these were not there."""
    some = samples(renderer)
    n = sum(s.trainable for s in some)
    ids = torch.cat([s.token_ids[s.loss_mask] for s in some])
    valid = torch.arange(n) % 2 == 0

    class Answers(BaseTeacher):
        provides = frozenset({"topk", "sampled"})

        def __init__(self, bad):
            super().__init__()
            top = torch.stack([ids, (ids + 1) % 30], 1)
            logprobs = torch.log(torch.tensor([[0.6, 0.3]])).repeat(n, 1)
            top[~valid], logprobs[~valid] = (-1, torch.nan) if bad else (0, -1.0)
            self.target = TopKLogProbs(top, logprobs, logprobs[:, 0].clone(), valid)

        def score(self, samples, max_tokens=None):
            return TopKScores(self.target, 32)

    found = by_package(student, Answers(True), some, reverse_kl, support, renderer)
    assert found.isfinite().all() and close(found, by_package(student, Answers(False), some, reverse_kl, support, renderer))


def test_parts_of_a_routed_teacher_cost_and_tell_what_they_read(student, renderer, other):
    some = samples(renderer)
    one, both = external(other), RoutedTeacher({"new": external(other), "prior": external(other), "unused": external(other)})
    for teacher in (one, both):
        teacher.setup(student, renderer)
    assert both.score(some).cost == one.score(some).cost and both.logit_flops(9) == one.logit_flops(9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [["method=gkd"], ["method=grpo", "environment=calculator", "rollout.sampling.max_new_tokens=8"]]
)
def test_devices_that_write_unequally_often_go_on(tiny_run, case):  # noqa: F811
    """FSDP2: a rank without a prompt of the student's, or with longer episodes, does not leave the other one waiting."""
    base = [o for o in tiny_run if not re.match(r"trainer\.(max_steps|devices)|evaluation", o)]
    line = [*base, *case, "evaluation=none", "logger=none", "trainer=fsdp2", "trainer.devices=2", "trainer.max_steps=6"]
    code, output = call(*line, "study.name=unequal")
    assert code == 0, output
