"""The training step: gradients that do not depend on how a batch is cut, zero where there is nothing to learn, exact resume."""

import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.callbacks.gradient_estimators import scatter
from opd_lightning.config import CONF_DIR
from opd_lightning.data.batching import collate
from opd_lightning.data.prompts import PromptData, PromptStream
from opd_lightning.data.renderer import ChatRenderer, encode_chat
from opd_lightning.generation import TransformersGenerator
from opd_lightning.losses import Objective
from opd_lightning.losses.advantages import group_relative, leave_one_out, reinforce
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.policy_gradient import CrossEntropy, PolicyGradient
from opd_lightning.losses.token_weights import completion_mask, constant, sequence_mean, skip_first, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.optimizer import Optim
from opd_lightning.module import DistillationModule
from opd_lightning.rollout.base import single_turn
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers import LocalTeacher
from opd_lightning.teachers.contexts import NoContext, PrivilegedContext
from opd_lightning.teachers.reading import prompts_of
from opd_lightning.teachers.weights import External, FrozenStart, Live
from opd_lightning.toy.world import WorldTask
from opd_lightning.training.run import run
from opd_lightning.types import Completion, Rendered, Rollout, SamplingParams, Sequences, Verdict

LENGTHS = (2, 12, 3, 9, 1, 5)


class Ragged:
    """Completions of fixed random tokens whose lengths vary twelvefold."""

    on_policy = False
    student_writes = False
    teachers: frozenset[str] = frozenset()

    def __init__(self, num_iterations: int = 1, samples: int = 1):
        self.num_iterations, self.sampling = num_iterations, SamplingParams(max(LENGTHS), n=samples)

    def __call__(self, prompts, seed, generator=None, teachers=None):
        drawn = torch.randint(2, 30, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(7)).tolist()
        completions = [Completion(ids[:length], "stop") for ids, length in zip(drawn, LENGTHS, strict=True)]
        n = self.sampling.n
        assert len(prompts.examples) * n == len(LENGTHS)
        return Rollout(
            [
                single_turn(prompts.examples[b // n], b // n, prompts.rendered[b // n], completion, "dataset", False)
                for b, completion in enumerate(completions)
            ]
        )


def sequences_of(prompt: list[int], completion: list[int]) -> Sequences:
    """One completion behind its prompt, ready to be read."""
    sample = single_turn(None, 0, Rendered(prompt), Completion(completion, "stop"), "dataset", False)
    return collate([sample], 0, torch.device("cpu"))


def step(
    tiny,
    objective,
    *,
    teacher=None,
    dtype="float32",
    max_tokens_per_microbatch=None,
    rollout=None,
    verify=None,
    clip_norm=None,
    precision="32-true",
    halt_after=None,
    root=None,
    checkpointing=False,
):
    """One SGD step at rate 1 from the tiny model: (the module, its gradient as one vector, the step's metrics)."""
    model = Pretrained(tiny, dtype=dtype, checkpointing=checkpointing)
    tokenizer = model.tokenizer()
    renderer, rollout = ChatRenderer(tokenizer, model.template_options), rollout or Ragged()
    others = {"teacher": teacher, "reference": teacher}
    teachers = {name: LocalTeacher(weights, NoContext()) for name, weights in others.items() if weights is not None}
    for local in teachers.values():
        local.check_tokenizer(tokenizer)
    optim = Optim(torch.optim.SGD, lr=1.0, clip_norm=clip_norm, schedule="constant")
    writer = TransformersGenerator(tokenizer)
    module = DistillationModule(
        model, renderer, writer, rollout, objective, teachers, optim, 0, verify, max_tokens_per_microbatch, logits_chunk_size=5
    )
    if halt_after is not None:
        build, done = optim.build, []

        def halting(parameters, max_steps):
            """Updates after the first `halt_after` take steps of size zero."""
            optimizer, schedule = build(parameters, max_steps)
            optimizer.register_step_post_hook(lambda o, *_: done.append(1) or o.param_groups[0].update(lr=0.0))
            schedule.step = lambda: None
            return optimizer, schedule

        optim.build = halting
    prompts_per_step = len(LENGTHS) // rollout.sampling.n
    data = PromptData(WorldTask().examples("train"), renderer, prompts_per_step, 0, rollout.num_iterations)
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=rollout.num_iterations,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=root,
    )
    before = torch.cat([p.detach().flatten() for p in model.model().parameters()])
    trainer.fit(module, data)
    after = torch.cat([p.detach().flatten() for p in module.student.lm.parameters()])
    return module, before - after, trainer.callback_metrics


def distil(divergence=reverse_kl, support=None, aggregate=token_mean) -> Objective:
    return Objective(completion_mask, aggregate, divergence=divergence, vocab_support=support or FullVocabulary())


OBJECTIVES = {
    "sft": lambda: Objective(completion_mask, token_mean, cross_entropy=CrossEntropy()),
    "opd": distil,
    "opd_sequence_mean": lambda: distil(aggregate=sequence_mean),
    "opd_sampled": lambda: distil(support=SampledToken()),
    "grpo": lambda: Objective(completion_mask, token_mean, policy_gradient=PolicyGradient(group_relative)),
    "dr_grpo": lambda: Objective(completion_mask, partial(constant, tokens=12), policy_gradient=PolicyGradient(group_relative)),
    "opd_topk": lambda: distil(support=TopK(5)),
    "opd_topk_renormalised": lambda: distil(support=TopK(5, of="student", tail_bucket=False)),
    "rloo": lambda: Objective(
        completion_mask, partial(constant, tokens=1), policy_gradient=PolicyGradient(leave_one_out, None)
    ),
    "reinforce": lambda: Objective(
        completion_mask, partial(constant, tokens=1), policy_gradient=PolicyGradient(reinforce, None)
    ),
    "grpo_opd": lambda: Objective(
        completion_mask,
        token_mean,
        reverse_kl,
        FullVocabulary(),
        PolicyGradient(group_relative),
        coefficients={"divergence": 0.5},
    ),
    "sft_kl": lambda: Objective(
        completion_mask, token_mean, cross_entropy=CrossEntropy(), reference=reverse_kl, coefficients={"reference": 0.3}
    ),
    "skip_first": lambda: Objective(partial(skip_first, n=2), token_mean, cross_entropy=CrossEntropy()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_gradients_do_not_depend_on_the_micro_batch(tiny, other, name, dtype, tolerance):
    """All at once, about three rows at a time, one row at a time; lengths vary twelvefold."""
    gradients = []
    for budget in (None, 45, 1):
        objective = OBJECTIVES[name]()
        teacher = External(other, dtype=dtype) if objective.teachers else None
        options = dict(rollout=Ragged(samples=3), verify=reward_some, dtype=dtype, max_tokens_per_microbatch=budget)
        gradients.append(step(tiny, objective, teacher=teacher, **options)[1])
    whole = gradients[0]
    assert whole.norm() > 1e-2
    for cut in gradients[1:]:
        assert (cut - whole).norm() / whole.norm() < tolerance


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd])
@pytest.mark.parametrize("support", [FullVocabulary(), SampledToken(), TopK(4), TopK(4, "student", False)])
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(tiny, divergence, support):
    _, gradient, metrics = step(tiny, distil(divergence, support), teacher=FrozenStart(), dtype="float64")
    assert abs(float(metrics["train/loss"])) < 1e-12 and gradient.norm() < 1e-12
    assert float(metrics["train/reverse_kl"]) < 1e-12 and float(metrics["train/top1_agreement"]) == 1.0


def test_the_gradient_is_that_of_the_plain_loss(tiny, other):
    """Against full logits of both models on the joined sequences, without any of the package's machinery."""
    _, gradient, metrics = step(tiny, distil(), teacher=External(other, dtype="float64"), dtype="float64")
    student, teacher = Pretrained(tiny, "float64").model(), Pretrained(other, "float64").model()
    examples = WorldTask().examples("train")
    data = PromptData(examples, ChatRenderer(Pretrained(tiny).tokenizer()), len(LENGTHS), 0)
    prompts = data.collate(next(iter(PromptStream(len(examples), len(LENGTHS), 0))))
    samples = Ragged()(prompts, 0).samples
    total = torch.zeros((), dtype=torch.float64)
    for rendered, sample, n in zip(prompts.rendered, samples, LENGTHS, strict=True):
        prompt = rendered.token_ids
        ids = torch.tensor([[*prompt, *sample.completion_ids]])
        here = slice(len(prompt) - 1, len(prompt) - 1 + n)
        assert ids.shape[1] == len(prompt) + n
        s, t = student(ids).logits[0, here].log_softmax(-1), teacher(ids).logits[0, here].detach().log_softmax(-1)
        total = total + (s.exp() * (s - t)).sum()
    loss = total / sum(LENGTHS)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert abs(float(metrics["train/loss"]) - loss.item()) < 1e-6
    assert (gradient - expected).norm() / expected.norm() < 1e-6  # the weights 1/Z are float32


def reward_some(example, text):
    return Verdict(float(len(text) % 3 == 0), 0.0)


def grpo(**options) -> Objective:
    return Objective(completion_mask, token_mean, policy_gradient=PolicyGradient(group_relative, **options))


@pytest.mark.parametrize("max_tokens_per_microbatch", [None, 1])
def test_equal_rewards_are_a_silent_step_that_is_counted(tiny, max_tokens_per_microbatch):
    """No gradient rather than a zero gradient: AdamW would move weights on the latter."""
    module, gradient, metrics = step(
        tiny,
        grpo(),
        rollout=Ragged(samples=3),
        verify=lambda e, t: Verdict(1.0, 1.0),
        max_tokens_per_microbatch=max_tokens_per_microbatch,
    )
    assert gradient.abs().max() == 0 and float(metrics["train/skipped"]) == 1.0
    assert module.trainer.global_step == 1 and all(p.grad is None for p in module.student.parameters())
    assert float(metrics["rollout/frac_reward_zero_std"]) == 1.0


def test_the_policy_ratio_starts_at_one_and_moves_with_updates(tiny):
    """The ratio is taken to the policy before the first update on a rollout."""
    options = dict(rollout=Ragged(samples=3), verify=reward_some, clip_norm=0.5)
    _, _, first = step(tiny, grpo(), **options)
    assert float(first["train/ratio"]) == 1.0 and float(first["train/clip_fraction"]) == 0.0
    _, _, fourth = step(tiny, grpo(), **{**options, "rollout": Ragged(num_iterations=4, samples=3)})
    assert float(fourth["train/ratio"]) != 1.0 and float(fourth["train/clip_fraction"]) > 0.0


@pytest.mark.parametrize("objective", [grpo, lambda: distil(support=SampledToken())], ids=["grpo", "opd_sampled"])
def test_the_first_of_several_updates_equals_a_single_one(tiny, other, objective):
    """Recorded log-probabilities change nothing where the policy has not moved: two updates of which the second is void."""
    options = dict(verify=reward_some, dtype="float64", teacher=External(other, dtype="float64"))
    gradients = []
    for updates in (1, 2):
        _module, gradient, _ = step(tiny, objective(), rollout=Ragged(updates, samples=3), halt_after=1, **options)
        gradients.append(gradient)
    assert gradients[0].norm() > 1e-3
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-10


def test_a_teacher_equal_to_the_student_stays_equal_under_autocast(tiny):
    """Both sides of the divergence are projected in the same dtype."""
    _, gradient, metrics = step(tiny, distil(), teacher=FrozenStart(), precision="bf16-mixed")
    assert abs(float(metrics["train/reverse_kl"])) < 1e-6 and gradient.norm() < 1e-5


def test_a_live_teacher_is_a_snapshot(tiny):
    student = Student(Pretrained(tiny).model())
    teacher = Live()
    teacher.setup(student)
    scores = teacher.read([sequences_of([3, 4], [5, 6])])
    before = scores.project(scores.hidden)
    with torch.no_grad():
        student.head.weight.add_(1.0)
    assert torch.equal(scores.project(scores.hidden), before)


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_models_that_scale_or_cap_their_logits_are_reproduced(family):
    """Backbone and head together give the model's own logits."""
    import transformers as hf

    size = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    more = {
        "granite": dict(logits_scaling=8.0),
        "cohere": dict(logit_scale=0.3, num_key_value_heads=2),
        "gemma2": dict(final_logit_softcapping=0.7, num_key_value_heads=2, head_dim=8),
    }
    name = {"granite": "Granite", "cohere": "Cohere", "gemma2": "Gemma2"}[family]
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**size, **more[family], initializer_range=0.5)
    student = Student(getattr(hf, f"{name}ForCausalLM")(config).eval())
    student.verify_head(f"model.path={family}")
    scores = student.read([sequences_of([3, 4], [5, 6, 7])])
    expected = student.lm(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0, 1:4]
    torch.testing.assert_close(scores.project(scores.hidden), expected, rtol=1e-4, atol=1e-5)


def test_a_model_whose_logits_cannot_be_reproduced_is_refused(tiny):
    student = Student(Pretrained(tiny).model())
    student.lm.config.logit_scale = 3.0  # said, and not done
    with pytest.raises(ValueError, match=r"model\.path=odd: LlamaForCausalLM changes its hidden states or logits"):
        student.verify_head("model.path=odd")


def test_a_seed_decides_everything(small):
    """Two runs of one configuration in two folders end with equal bits."""
    weights = []
    for study in ("a", "b"):
        folder = run(small("method=opd", f"study.name={study}"))
        weights.append(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(
    "method", ["opd", "grpo", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sft", "sdft", "seqkd", "gkd"))]
)
def test_a_run_that_is_extended_equals_one_that_was_never_stopped(small, method):
    """Bit-equal weights, optimizer and token counts; metrics and evaluations hold each step once."""
    parts = (f"method={method}", "evaluation.every=2")
    folder = run(small(*parts, "study.name=parts", "trainer.max_steps=3"))
    assert run(small(*parts, "study.name=parts", "trainer.max_steps=5")) == folder
    whole = run(small(*parts, "study.name=whole", "trainer.max_steps=5"))
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, whole))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in b["state_dict"])
    states = [c["optimizer_states"][0]["state"] for c in (a, b)]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[1] for k in ("exp_avg", "exp_avg_sq"))
    assert a["ledger"]["tokens"] == b["ledger"]["tokens"]
    steps = [[line.split(",")[0] for line in (f / "metrics.csv").read_text().splitlines()[1:]] for f in (folder, whole)]
    assert steps[0] == ["0", "1", "2", "3", "4", "5"] == steps[1]
    ends = [json.loads((f / "evaluation.json").read_text())["end"] for f in (folder, whole)]
    assert ends[0] == ends[1]


def test_the_checkpoint_holds_the_student_only(small):
    folder = run(small("method=sdft"))
    checkpoint = torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True)
    assert all(name.startswith("student.lm.") for name in checkpoint["state_dict"])


def test_prompts_reach_the_teacher_behind_its_own_context(small, tiny):
    """SDFT's teacher reads the demonstration; the completion ids are the student's."""
    tokenizer = Pretrained(tiny).tokenizer()
    renderer, examples = ChatRenderer(tokenizer), WorldTask().examples("train")[:2]
    samples = Ragged()(PromptData(examples, renderer, 2, 0).collate([0, 1, 0, 1, 0, 1]), 0).samples
    teacher = LocalTeacher(FrozenStart(), PrivilegedContext("demonstration", "{prompt} [ {demonstration} ]"))
    teacher.setup(Student(Pretrained(tiny).model()), renderer)
    ids = prompts_of(teacher, samples)
    shown = tokenizer.decode(ids[0])
    assert examples[0].demonstration in shown and shown.endswith("] =")
    assert encode_chat(tokenizer, examples[0].messages) != ids[0]


def test_a_budget_ends_a_run_and_the_run_is_finished(small):
    """At the first rollout that reaches it; the last step is evaluated, and the same command does nothing more."""
    overrides = ("method=opd", "budget.student_tokens=70", "~trainer.max_steps", "evaluation.every=100")
    cfg = small(*overrides)
    assert cfg.trainer.max_steps == -1
    folder = run(cfg)
    status, ledger, evaluation = (json.loads((folder / f"{n}.json").read_text()) for n in ("status", "ledger", "evaluation"))
    assert status["state"] == "finished" and status["ended_by"] == "budget.student_tokens"
    assert 70 <= ledger["tokens"]["student_tokens"] < 70 + 4 * 12
    assert evaluation["end"]["step"] == status["step"] > 1
    assert run(small(*overrides)) == folder and json.loads((folder / "ledger.json").read_text()) == ledger


def test_ratio_and_clip_are_active_at_four_num_iterations(small):
    """With clip-higher, on the shipped start model, whose samples are right now and then."""
    folder = run(
        small(
            "model=world",
            "~model.path",
            "~model.teacher",
            "method=grpo",
            "loss/policy_gradient=clip_higher",
            "rollout.num_iterations=4",
            "trainer.max_steps=8",
            "data.batch_size=32",
            "task.n_train=64",
            "optim.lr=2e-3",
            "optim.warmup_steps=0",
            "evaluation=none",
        )
    )
    rows = read_csv(folder / "metrics.csv")
    assert rows[-1]["train/ratio"] != 1.0 and rows[-1]["train/clip_fraction"] > 0.0
    assert all(row["train/skipped"] == 0.0 for row in rows if "train/skipped" in row)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(p.stem for p in (Path(CONF_DIR) / "method").glob("*.yaml")))
def test_every_preset_improves_the_new_skill(small, method):
    """On the embedded default, 100 updates; by more than twice the half-width of its interval over prompts. What `opcd` teaches
    is a rule: the style of the answers."""
    given, number = (["task.format=listed"], "new/format") if method == "opcd" else ([], "new/accuracy")
    sizes = ("~task.n_train", "~task.n_eval", "~data.batch_size", "~model.path", "~model.teacher", "trainer.max_steps=100")
    folder = run(small("model=world", f"method={method}", "evaluation.every=100", *sizes, *given))
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["intervals"]["end"][number]["low"] > record["intervals"]["start"][number]["high"]


def test_a_batch_that_breaks_the_loss_is_saved_too(tiny, other, tmp_path):
    """NaN in a weight of the teacher: found before any gradient, with the batch at hand."""
    teacher = External(other)
    setup = teacher.setup

    def poisoned(student):
        setup(student)
        teacher.model.lm.model.norm.weight.data[0] = float("nan")

    teacher.setup = poisoned
    with pytest.raises(
        ValueError, match=r"update 1: the loss of 32 of 32 tokens is not finite.* the batch is in (.*)nonfinite-step-1"
    ):
        step(tiny, distil(), teacher=teacher, root=tmp_path)
    assert torch.load(next(tmp_path.glob("nonfinite-*")), weights_only=True)["step"] == 1


def test_nothing_to_learn_from_is_refused_at_the_first_rollout(tiny):
    objective = Objective(partial(skip_first, n=50), token_mean, cross_entropy=CrossEntropy())
    with pytest.raises(ValueError, match=r"loss\.weight leaves no token of the first rollout"):
        step(tiny, objective)


def test_activation_checkpointing_changes_no_gradient(tiny, other):
    """The backbone is computed twice, the head once; rollouts and teachers stay in eval mode."""
    gradients = [step(tiny, distil(), teacher=External(other), checkpointing=c)[1] for c in (False, True)]
    assert gradients[0].norm() > 1e-3 and (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-6


def test_kl_is_logged_by_position(tiny, other):
    _, _, metrics = step(tiny, distil(), teacher=External(other))
    by_position = {k: float(v) for k, v in metrics.items() if k.startswith("position/reverse_kl")}
    assert set(by_position) == {"position/reverse_kl_from_0", "position/reverse_kl_from_4"}
    early = sum(min(n, 4) for n in LENGTHS)
    mean = (by_position["position/reverse_kl_from_0"] * early + by_position["position/reverse_kl_from_4"] * (32 - early)) / 32
    assert mean == pytest.approx(float(metrics["train/reverse_kl"]), rel=1e-5)


class Widest(TorchDispatchMode):
    """Remembers the most rows of any tensor as wide as the vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()  # an expanded view holds nothing more
                self.rows = max(self.rows, min(tensor.numel(), stored) // self.vocabulary)
        return out


PRESETS = sorted(p.stem for p in (Path(CONF_DIR) / "method").glob("*.yaml"))
FAST = ("sft", "opd", "opd_topk", "sdpo", "grpo_opd", "sft_kl")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in FAST else pytest.mark.slow) for m in PRESETS])
def test_no_preset_ever_holds_the_logits_of_a_batch(small, narrow, method):
    """Over two whole runs: at most a chunk of rows, or the rows of one decoding step, exists at a time."""
    models = (f"model.path={narrow[0]}", f"model.teacher={narrow[1]}")
    cfg = small(f"method={method}", *models, "logits_chunk_size=4", "evaluation=none", "task.max_new_tokens=12")
    with Widest(vocabulary=32) as watch:
        run(cfg)
    decoding = 8 * 4  # completions that are decoded at a time, at most
    assert 0 < watch.rows <= decoding


def test_the_panel_tells_bias_from_variance():
    """Draws around a shifted mean: the shift is squared bias, what is left of the mean square is variance."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4, 5, generator=generator)
    shift = 0.5 * exact
    draws = [exact + shift + torch.randn(4, 5, generator=generator) for _ in range(4000)]
    told = scatter(draws, exact)
    noise = exact.numel() / exact.square().sum().item()
    assert told["squared_bias"] == pytest.approx(0.25, rel=0.05) and told["variance"] == pytest.approx(0.25 + noise, rel=0.05)
    assert "squared_bias" not in scatter(draws[:1], exact)


def test_the_estimator_panel_ranks_estimates_as_theory_does(small):
    """On the real start model and teacher: more of the vocabulary is closer, a baseline takes variance away."""
    sizes = ("~model.path", "~model.teacher", "data.batch_size=8", "task.n_train=16", "evaluation=none")
    panel = (
        "callbacks=estimators",
        "callbacks.estimators.every=2",
        "callbacks.estimators.ks=[1,16,31]",
        "callbacks.estimators.draws=64",
    )
    rows = read_csv(run(small("model=world", "method=opd", *sizes, *panel)) / "metrics.csv")
    found = {k.removeprefix("estimators/"): v for row in rows for k, v in row.items() if k.startswith("estimators/")}
    assert found["top31/relative_error"] < 1e-3 and found["top16/relative_error"] < found["top1/relative_error"]
    assert found["top16/teacher_tail_mass"] < found["top1/teacher_tail_mass"]
    assert found["sampled_baseline/variance"] < found["sampled/variance"]
    for name in ("sampled", "sampled_baseline"):  # unbiased: within what 64 draws tell
        assert abs(found[f"{name}/squared_bias"]) < 0.1 * found[f"{name}/variance"]
    assert found["top31/cosine"] > 0.999
