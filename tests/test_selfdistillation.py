"""Self-distillation: whose weights the teacher has, what it is shown, and that it scores exactly what the student wrote."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_lightning.config.compatibility import check
from opd_lightning.data.batching import collate
from opd_lightning.data.renderer import ChatRenderer, encode_chat
from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.losses import Objective
from opd_lightning.losses.divergences import forward_kl, reverse_kl
from opd_lightning.losses.policy_gradient import CrossEntropy
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.rollout.base import single_turn
from opd_lightning.teachers import LocalTeacher
from opd_lightning.teachers.contexts import Feedback, FirstOf, PrivilegedContext, Rule, Sibling
from opd_lightning.teachers.reading import prompts_of
from opd_lightning.teachers.weights import Average, FrozenStart, Live, TrustRegion
from opd_lightning.toy.world import WorldTask
from opd_lightning.training.run import run
from opd_lightning.types import Attempt, Completion, Example, Sample, SamplingParams, Verdict

SHOWN = "{prompt} [ {demonstration} ]"


def lora(**more):
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", **more)


def student_of(path, adapter=None) -> Student:
    torch.manual_seed(0)
    lm = Pretrained(path).model()
    return Student(lm if adapter is None else adapters.add(lm, adapter))


def moved(student: Student, seed: int) -> None:
    """As an optimizer step would, every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)


def samples_of(tokenizer, examples, n=1, lengths=None, ids=None) -> list[Sample]:
    """`n` completions of each example, of random words unless the ids [B, T] are given."""
    asked = [(group, e) for group, e in enumerate(examples) for _ in range(n)]
    lengths = lengths or [3 + b % 3 for b in range(len(asked))]
    if ids is None:
        ids = torch.randint(2, 12, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    renderer = ChatRenderer(tokenizer)
    return [
        single_turn(e, group, renderer.render(e.messages), Completion(ids[b, : lengths[b]].tolist(), "stop"), "student", False)
        for b, (group, e) in enumerate(asked)
    ]


def judged(samples, verdicts) -> list[Sample]:
    return [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]


def inputs(samples) -> torch.Tensor:
    """Ids [B, L] for a plain forward pass."""
    return collate(samples, 0, torch.device("cpu")).input_ids


def ready(weights, student, tokenizer, context=None) -> LocalTeacher:
    """A teacher with these weights, once, when training begins."""
    teacher = LocalTeacher(weights, context)
    teacher.setup(student, ChatRenderer(tokenizer))
    return teacher


def logits_of(scores) -> torch.Tensor:
    return scores.chunk(slice(None)).logits.float()


def own(student, tokenizer, samples) -> torch.Tensor:
    """The student's own logits."""
    return logits_of(ready(Live(), student, tokenizer).score(samples))


@pytest.fixture
def world(tiny):
    tokenizer = Pretrained(tiny).tokenizer()
    return tokenizer, samples_of(tokenizer, list(WorldTask().examples("train"))[:4])


# --- whose weights


@pytest.mark.parametrize("every", [1, 2])
def test_an_average_follows_its_recursion(tiny, every):
    student, policy = student_of(tiny), Average(0.25, every)
    policy.setup(student)
    expected = {name: p.detach().clone() for name, p in student.named_parameters()}
    for step in range(1, 5):
        moved(student, step)
        policy.after_update()
        if step % every == 0:
            expected = {name: torch.lerp(expected[name], p.detach(), 0.25) for name, p in student.named_parameters()}
    assert all(torch.equal(policy.average[name], value) for name, value in expected.items())


def test_a_rate_of_one_copies_the_student_now_and_then(tiny, world):
    tokenizer, samples = world
    student = student_of(tiny)
    teacher = ready(Average(1.0, every=2), student, tokenizer)
    seen = []
    for step in range(4):
        moved(student, step)
        teacher.after_update()
        same = logits_of(teacher.score(samples))
        seen.append(torch.equal(same, own(student, tokenizer, samples)))
    assert seen == [False, True, False, True]


@pytest.mark.parametrize("kind", ["all", "effective", "factors"])
def test_an_average_reads_as_the_model_with_those_weights_and_leaves_the_student_alone(tiny, world, kind):
    tokenizer, samples = world
    student = student_of(tiny, None if kind == "all" else lora())
    policy = Average(0.3, of="factors" if kind == "factors" else "effective")
    teacher = ready(policy, student, tokenizer)
    for step in range(3):
        moved(student, step)
        teacher.after_update()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    found = logits_of(teacher.score(samples))
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert flags == {name: p.requires_grad for name, p in student.named_parameters()}
    plain = student_of(tiny, None if kind == "all" else lora())
    if kind == "effective":
        # The dense average of B A after each step, made by hand, in the base weights of a model without adapter.
        plain, twin = student_of(tiny), student_of(tiny, lora())
        change = {name: 0.0 for name in adapters.layers(twin.lm)}
        for step in range(3):
            moved(twin, step)
            for name, layer in adapters.layers(twin.lm).items():
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                change[name] = 0.7 * change[name] + 0.3 * 2.0 * (b @ a).detach()
        for name, delta in change.items():
            plain.lm.get_submodule(name).weight.data += delta
    else:
        plain.load_state_dict({**plain.state_dict(), **policy.average})
    expected = own(plain, tokenizer, samples)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with policy.language_model() as lm:
        assert not torch.equal(lm(input_ids=inputs(samples)).logits, student_of(tiny).lm(input_ids=inputs(samples)).logits)


def test_autocast_does_not_remember_the_student_where_the_average_is_read(tiny, world):
    _, samples = world
    student, policy = student_of(tiny).train(), Average(0.5)
    policy.setup(student)
    moved(student, 1)
    with torch.no_grad():
        start = student_of(tiny).lm(input_ids=inputs(samples)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student.lm(input_ids=inputs(samples))
        with policy.language_model() as lm:
            found = lm(input_ids=inputs(samples)).logits
    assert (found - start).abs().mean() < 0.1 * start.abs().mean()


def test_a_fresh_adapter_needs_no_copy_of_the_start(tiny, world):
    tokenizer, samples = world
    start = own(student_of(tiny), tokenizer, samples)
    student, policy = student_of(tiny, lora()), FrozenStart()
    teacher = ready(policy, student, tokenizer)
    assert policy.model is None
    moved(student, 1)
    assert torch.equal(logits_of(teacher.score(samples)), start)
    assert not torch.equal(own(student, tokenizer, samples), start)
    assert all(p.requires_grad == ("lora_" in name) for name, p in student.named_parameters())


def test_an_adapter_that_already_says_something_is_copied(tiny, world):
    tokenizer, samples = world
    student, policy = student_of(tiny, lora(init_lora_weights=False)), FrozenStart()
    start = own(student, tokenizer, samples)
    teacher = ready(policy, student, tokenizer)
    assert policy.model is not None
    moved(student, 1)
    assert torch.equal(logits_of(teacher.score(samples)), start)


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_trust_region_interpolates_logits(tiny, world, adapter):
    tokenizer, samples = world
    student = student_of(tiny, lora() if adapter else None)
    teacher = ready(TrustRegion(0.25), student, tokenizer)
    start = own(student, tokenizer, samples)
    moved(student, 1)
    now = own(student, tokenizer, samples)
    read = teacher.score(samples)
    moved(student, 2)  # what was read does not follow later updates
    torch.testing.assert_close(logits_of(read), 0.75 * start + 0.25 * now)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["lm_head"]}, r"adapter\.target_modules=.*adapts the output layer"),
        ({"target_modules": ["nope"]}, "adapter: PEFT cannot put it into LlamaForCausalLM"),
        ({"target_modules": "all-linear", "r": "two"}, "adapter: PEFT cannot put it into"),
        ({"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}, "adapter trains more than low-rank factors"),
        ({"target_modules": "all-linear", "init_lora_weights": "pissa"}, "changes the frozen weights too"),
    ],
)
def test_adapters_that_cannot_be_kept_are_refused(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        adapters.add(Pretrained(tiny).model(), LoraConfig(task_type="CAUSAL_LM", **options))


def test_an_effective_average_survives_a_bfloat16_base(tiny, world):
    """A change far below the base's rounding is still read: the teacher that copies the student is the student."""
    tokenizer, samples = world
    lm = adapters.add(Pretrained(tiny, dtype="bfloat16").model(), lora())
    student = Student(lm)
    teacher = ready(Average(1.0), student, tokenizer)
    start = own(student, tokenizer, samples)
    for name, p in student.named_parameters():
        p.data += 0.004 if "lora_B" in name else 0.0
    teacher.after_update()
    now = own(student, tokenizer, samples)
    read = logits_of(teacher.score(samples))
    assert (read - now).abs().mean() < 0.35 * (start - now).abs().mean()


def test_untold_rows_are_in_no_number_and_make_no_step(small):
    """Beside a reward that says nothing either: the step is silent, and the teacher's numbers are absent, not made up."""
    from opd_lightning.runs.metrics_file import read_csv

    overrides = [
        "method=sdpo",
        "context=sibling",
        "loss/policy_gradient=grpo",
        "rollout.num_generations=2",
        "evaluation=text",
    ]
    folder = run(small(*overrides, "task.skill=complement"))
    rows = [row for row in read_csv(folder / "metrics.csv") if "train/skipped" in row]
    assert rows and all(row["rollout/teacher_valid"] == 0 and row["train/skipped"] == 1 for row in rows)
    assert not any("train/forward_kl" in row or "train/teacher_entropy" in row for row in rows)
    assert "heldout/reverse_kl" not in json.loads((folder / "evaluation.json").read_text())["end"]


def test_a_merged_adapter_is_the_same_model(tiny, world):
    _, samples = world
    student = student_of(tiny, lora())
    moved(student, 1)
    expected = student.eval().lm(input_ids=inputs(samples)).logits
    plain = adapters.merged(student.lm)
    assert not adapters.layers(plain) and set(plain.state_dict()) == set(Pretrained(tiny).model().state_dict())
    torch.testing.assert_close(plain(input_ids=inputs(samples)).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["method=sdft", "teacher=ema", "teacher.rate=0.3"], marks=pytest.mark.slow),
        ["method=sdft", "teacher=ema", "teacher.rate=0.3", "adapter=lora", "adapter.r=2", "optim.lr=0.01"],
        pytest.param(
            ["method=sdft", "teacher=ema", "teacher.of=factors", "adapter=lora", "adapter.r=2", "optim.lr=0.01"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["method=sdft", "teacher=sync", "teacher.every=2"], marks=pytest.mark.slow),
        ["method=sdpo", "rollout.num_generations=3", "trainer.precision=bf16-mixed"],
        pytest.param(
            ["method=sdft", "adapter=lora", "adapter.r=2", "adapter.lora_dropout=0.3", "optim.lr=0.01"], marks=pytest.mark.slow
        ),
    ],
    ids=["ema", "ema_lora", "factors", "sync", "sdpo", "frozen_lora"],
)
def test_stopping_at_a_step_and_going_on_changes_no_bit(small, overrides):
    """Teacher and student alike; `max_steps` is not part of a run's identity under a constant schedule."""
    ends = {}
    for name, horizons in (("unbroken", [5]), ("broken", [2, 5])):
        for steps in horizons:
            folder = run(small(*overrides, f"study.name={name}", f"trainer.max_steps={steps}", "evaluation=none"))
        ends[name] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "teachers"):
        flat = [dict(leaves(end[part])) for end in ends.values()]
        assert flat[0].keys() == flat[1].keys() and (flat[0] or part == "teachers")
        assert all(torch.equal(torch.as_tensor(flat[0][k]), torch.as_tensor(flat[1][k])) for k in flat[0])


def leaves(node, path=""):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, node


def test_a_run_with_an_adapter_keeps_only_the_adapter_and_can_be_built_upon(small, tiny):
    first = run(small("method=sft", "adapter=lora", "adapter.r=2", "optim.lr=0.05", "study.name=first"))
    state = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)
    merged = Pretrained(str(first)).model()
    assert not adapters.layers(merged)
    assert not torch.equal(merged.lm_head.weight, merged.model.layers[0].mlp.up_proj.weight)
    second = run(small("method=sdft", "adapter=lora", "adapter.r=2", f"model.path={first}", "study.name=second"))
    assert json.loads((second / "status.json").read_text())["start_model"] == [str(first), tiny]


# --- what it is shown

EXAMPLE = Example("e", [{"role": "user", "content": "sort 3 1 2 4 5"}], "a", "result 1", "answer 1")
RIGHT, WRONG = Verdict(1.0), Verdict(0.0, feedback="wrong")


def test_a_sibling_is_never_the_completion_itself():
    builder = Sibling("{prompt} [ {sibling} ]", strip="<think>.*?</think>")
    own, other = Attempt("own", RIGHT), Attempt("<think>\nx</think>other", RIGHT)
    assert builder(EXAMPLE, own, []) is None
    assert builder(EXAMPLE, own, [Attempt("bad", WRONG)]) is None
    assert builder(EXAMPLE, own, [Attempt("bad", WRONG), other])[-1]["content"] == "sort 3 1 2 4 5 [ other ]"


def test_rows_of_a_prompt_see_the_other_rows_alone(tiny):
    tokenizer = Pretrained(tiny).tokenizer()
    verdicts = [RIGHT, WRONG, WRONG, WRONG, WRONG, WRONG]
    samples = judged(samples_of(tokenizer, list(WorldTask().examples("train"))[:2], n=3), verdicts)
    teacher = ready(Live(), student_of(tiny), tokenizer, Sibling("{prompt} [ {sibling} ]"))
    prompts = prompts_of(teacher, samples)
    told = [ids is not None for ids in prompts]
    assert told == [False, True, True, False, False, False]
    read = teacher.score(samples)
    assert read.metrics["valid"].tolist() == told
    assert read.valid.tolist() == [known for known, sample in zip(told, samples, strict=True) for _ in range(sample.trainable)]
    assert not read.metrics["overlong"].any()
    short = ready(Live(), student_of(tiny), tokenizer, Sibling("{prompt} [ {sibling} ]", max_prompt_tokens=5))
    assert short.score(samples).metrics["overlong"].tolist() == told
    lengths = [sample.trainable for sample in samples]
    assert read.cost.tokens == sum(len(p) + n for p, n in zip(prompts, lengths, strict=True) if p is not None)


def test_feedback_and_the_first_of_several():
    feedback = Feedback("{prompt} [ {feedback} ]")
    assert feedback(EXAMPLE, Attempt("x", RIGHT)) is None
    assert feedback(EXAMPLE, Attempt("x", WRONG))[-1]["content"].endswith("[ wrong ]")
    both = FirstOf({"sibling": Sibling("{prompt} [ {sibling} ]"), "off": None, "feedback": feedback})
    assert both(EXAMPLE, Attempt("x", WRONG), [Attempt("y", RIGHT)])[-1]["content"].endswith("[ y ]")
    assert both(EXAMPLE, Attempt("x", WRONG), [Attempt("y", WRONG)])[-1]["content"].endswith("[ wrong ]")
    assert both(EXAMPLE, Attempt("x", RIGHT), []) is None
    with pytest.raises(ValueError, match=r"context\.choices is empty"):
        FirstOf({"sibling": None})


def test_a_rule_comes_before_the_chat_and_its_own_system_prompt():
    rule = Rule("Be loud.", [{"user": "Hi", "assistant": "HI"}])
    turns = [("user", "Hi"), ("assistant", "HI"), ("user", "sort 3 1 2 4 5")]
    assert [(m["role"], m["content"]) for m in rule(EXAMPLE)] == [("system", "Be loud."), *turns]
    own = replace(EXAMPLE, messages=[{"role": "system", "content": "Be kind."}, *EXAMPLE.messages])
    assert [(m["role"], m["content"]) for m in rule(own)] == [("system", "Be loud.\n\nBe kind."), *turns]
    with pytest.raises(ValueError, match="neither a rule nor worked examples"):
        Rule()
    with pytest.raises(ValueError, match="a worked example is"):
        Rule("x", [{"question": "Hi"}])


def test_rows_that_are_told_nothing_cost_nothing_and_change_nothing(tiny):
    """A batch with untold rows has the loss and the gradient of the batch without them."""
    tokenizer = Pretrained(tiny).tokenizer()
    examples = list(WorldTask().examples("train"))[:3]
    samples = judged(samples_of(tokenizer, examples, lengths=[4, 2, 5]), [WRONG, RIGHT, WRONG])
    context = Feedback("{prompt} [ {feedback} ]")
    found = [walked(tiny, [samples[b] for b in keep], context) for keep in ([0, 1, 2], [0, 2])]
    (all_rows, tokens), (told_rows, fewer) = found
    torch.testing.assert_close(all_rows, told_rows)
    assert tokens == fewer


def walked(tiny, samples, context, objective=None):
    """The gradient of one update on given samples with their verdicts, and the tokens that the teacher read."""
    from opd_lightning.module import DistillationModule
    from opd_lightning.utils.metrics import StepMetrics

    objective = objective or Objective(completion_mask, token_mean, forward_kl, FullVocabulary())
    model = Pretrained(tiny)
    tokenizer = model.tokenizer()
    renderer, teacher = ChatRenderer(tokenizer), LocalTeacher(FrozenStart(), context)
    policy = type(
        "Given",
        (),
        {
            "teachers": frozenset(),
            "num_iterations": 1,
            "student_writes": True,
            "on_policy": True,
            "sampling": SamplingParams(8),
        },
    )()
    parts = (model, renderer, TransformersGenerator(tokenizer), policy, objective, {"teacher": teacher})
    module = DistillationModule(*parts, optim=None, seed=0, verify=lambda e, t: None)
    module.student = Student(model.model())
    teacher.setup(module.student, renderer)
    module.all_sum = lambda value: value
    module._trainer = type("Trainer", (), {"global_step": 1})()
    metrics = StepMetrics()
    batch = module.score(samples, metrics)
    sequences, tokens, scores = batch.micro(batch.active, 0)
    loss, _ = module.student(sequences, tokens, scores, objective)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters()]), int(metrics.totals.get("teacher_tokens", 0))


def test_beside_another_term_untold_rows_lose_the_divergence_alone(tiny):
    tokenizer = Pretrained(tiny).tokenizer()
    samples = judged(samples_of(tokenizer, list(WorldTask().examples("train"))[:2], lengths=[3, 3]), [WRONG, RIGHT])
    context = Feedback("{prompt} [ {feedback} ]")

    def gradient(**terms):
        parts = dict(weight=completion_mask, aggregate=token_mean)
        return walked(tiny, samples, context, Objective(**parts, **terms))[0]

    kl = dict(divergence=reverse_kl, vocab_support=FullVocabulary())
    both, alone = gradient(**kl, cross_entropy=CrossEntropy()), gradient(**kl)
    ce = gradient(**kl, cross_entropy=CrossEntropy(), coefficients={"divergence": 0.0})
    # Alone, the mean is over the told row's three tokens; beside cross-entropy it is over all six.
    torch.testing.assert_close(both, ce + alone / 2, rtol=1e-4, atol=1e-6)


# --- that it scores exactly what the student wrote

CORPUS = ["sort the numbers 3 1 2", "what is the answer?", "äöü — ¿qué? 数字", "the quick brown fox", "[ result ] = done"]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% if enable_thinking %}<think>{% endif %}{% endif %}",
    "turns": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


def families() -> dict[str, PreTrainedTokenizerFast]:
    special = ["<pad>", "<eos>", "<unk>", "<|im|>", "<|end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>"))
    letters = sorted(set("".join(CORPUS)))
    character = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *letters])}, unk_token="<unk>"))
    character.pre_tokenizer, character.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    made = {"bytes": bpe, "unigram": unigram, "character": character}
    wrap = lambda t: PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")  # noqa: E731
    return {name: wrap(t) for name, t in made.items()}


FAMILIES = families()


@pytest.fixture(scope="module")
def reader() -> Student:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return Student(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_teacher_scores_the_very_ids_that_the_student_wrote(reader, family, template, data):
    """Whatever the texts, tokenizer, template and completions: never a text that is tokenized again, never off by one.

    The completions are arbitrary ids, such as no tokenizer would make of their text.
    """
    tokenizer = FAMILIES[family]
    tokenizer.chat_template = TEMPLATES[template]
    texts = st.text(alphabet="abc 123 äé数\n<>[]{}", max_size=20)
    rows = data.draw(st.lists(st.tuples(texts, texts, st.integers(1, 5)), min_size=1, max_size=4))
    examples = [Example(str(i), [{"role": "user", "content": p}], d, d) for i, (p, d, _) in enumerate(rows)]
    lengths = [n for *_, n in rows]
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    written = torch.randint(0, len(tokenizer), (len(rows), max(lengths)), generator=draw)
    samples = samples_of(tokenizer, examples, lengths=lengths, ids=written)
    context = PrivilegedContext("demonstration", "{prompt}\nFor example:\n{demonstration}", {"enable_thinking": True})
    max_tokens_per_microbatch = data.draw(st.sampled_from([None, 1, 64]))
    found = ready(Live(), reader, tokenizer, context).score(samples, max_tokens_per_microbatch)
    expected = []
    for example, ids, n in zip(examples, written.tolist(), lengths, strict=True):
        prompt = encode_chat(tokenizer, context(example), enable_thinking=True)
        with torch.no_grad():
            logits = reader.lm(input_ids=torch.tensor([prompt + ids[:n]])).logits[0]
        expected.append(logits[len(prompt) - 1 : len(prompt) + n - 1])
    torch.testing.assert_close(logits_of(found), torch.cat(expected), rtol=1e-4, atol=1e-5)


# --- bad input

BAD = {
    "rate": (["method=sdft", "teacher=ema", "teacher.rate=0"], r"teacher\.rate=0 must lie in \(0, 1\]"),
    "above": (["method=sdft", "teacher=ema", "teacher.rate=1.5"], r"teacher\.rate=1\.5 must lie in"),
    "every": (["method=sdft", "teacher=sync", "teacher.every=0"], r"teacher\.every=0 must be at least 1"),
    "of": (["method=sdft", "teacher=ema", "teacher.of=everything"], r"teacher\.of='everything' is unknown"),
    "share": (["method=sdft", "teacher=trust_region", "teacher.share=1"], r"teacher\.share=1 must lie in \(0, 1\)"),
    "writes": (
        ["method=seqkd", "teacher=trust_region", "context=demonstration"],
        "TrustRegion can only score",
    ),
    "waits": (["method=seqkd", "teacher=frozen", "context=sibling"], "waits for the student's attempts"),
    "alone": (["method=sdpo", "rollout.num_generations=1", "context=sibling"], "without siblings"),
    "off": (
        ["teacher=frozen", "context=none", "loss/cross_entropy=nll", "loss.coefficients.cross_entropy=0"],
        "zero by construction",
    ),
    "leftover": (["+evaluation.suite.sampled.samples=4"], r"evaluation\.suite\.sampled has options and no evaluation"),
    "silent": (["method=sdft", "context=none", "teacher=ema"], "zero by construction"),
    "rule": (["method=opcd", "context.system=null"], "neither a rule nor worked examples"),
    "limit": (["method=sdft", "context.max_prompt_tokens=8"], r"exceeds context\.max_prompt_tokens=8"),
    "own": (["method=sdft", "data.max_prompt_tokens=3"], r"exceeds data\.max_prompt_tokens=3"),
    "overlong": (["data.overlong=cut"], r"data\.overlong='cut' is unknown; choose refuse or drop"),
    "unjudged": (["method=sdpo", "task=instructions", "~task.n_eval"], "has no verifier, and the context of the teacher"),
    "undemonstrated": (["method=sdft", "task=instructions", "~task.n_eval"], "has no demonstration; context=demonstration"),
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_training(small, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(small(*overrides))


def test_a_template_without_system_role_is_refused_by_name(small):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template += "{{ m.content }} {% endfor %}="
    with pytest.raises(ValueError, match=r"refuses a chat of system, user .*model\.chat_template"):
        run(small("method=opcd", f'model.chat_template="{template}"'))


@pytest.mark.parametrize("turns", ["[]", "[{user: sort 1, assistant: answer 1}]"])
def test_a_template_that_leaves_the_rule_out_is_refused(small, turns):
    template = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}="
    with pytest.raises(ValueError, match="lacks its system turn"):
        run(small("method=opcd", f"context.turns={turns}", f'model.chat_template="{template}"'))


def test_overlong_examples_can_be_left_out_and_are_counted(small, tmp_path):
    rows = [{"prompt": "sort 1 2 3", "answer": "1"}, {"prompt": "sort 1 2 3 4 5 6 7", "answer": "1"}]
    rows = [{**row, "prompt": f"{row['prompt']} {i}", "completion": "1"} for i in range(10) for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [
        "task=table",
        f"task.path={tmp_path}/mine.jsonl",
        "task.n_eval=2",
        "~task.n_train",
        "task.columns.completion=completion",
    ]
    folder = run(
        small(
            "method=sft", "data.overlong=drop", "data.max_prompt_tokens=7", "data.batch_size=2", "task.max_new_tokens=8", *table
        )
    )
    data = json.loads((folder / "status.json").read_text())["data"]
    assert data["dropped"] > 0 and data["train"] + data["dropped"] == 16
    with pytest.raises(ValueError, match=r"data\.overlong=drop leaves none of the 16 training examples"):
        run(small("method=sdft", "data.overlong=drop", "context.max_prompt_tokens=8"))


def test_a_live_teacher_comes_with_a_caution(small):
    assert any("may collapse" in warning for warning in check(small("method=sdft", "teacher=live")))
