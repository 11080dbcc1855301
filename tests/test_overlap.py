"""Rollouts ahead of training: their weights and prompts, evaluations between, errors, interrupts, resume, time."""

import json
import os
import signal
import threading
import time

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from opd_lightning.config.compatibility import check
from opd_lightning.data.prompts import PromptData
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.generation import TransformersGenerator
from opd_lightning.losses import Objective
from opd_lightning.losses.advantages import group_relative
from opd_lightning.losses.divergences import reverse_kl
from opd_lightning.losses.policy_gradient import PolicyGradient
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.models import Pretrained
from opd_lightning.models.optimizer import Optim
from opd_lightning.module import DistillationModule
from opd_lightning.rollout import StudentRollout
from opd_lightning.runs.identity import run_hash
from opd_lightning.step.rollouts import Rollouts
from opd_lightning.teachers import LocalTeacher
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.weights import External
from opd_lightning.toy.world import WorldTask
from opd_lightning.training.run import run
from opd_lightning.types import SamplingParams, Verdict
from tests.slow_engine import SlowEngine
from tests.test_commands import call, tiny_run  # noqa: F401

ENGINE = ("generator._target_=tests.slow_engine.SlowEngine", "task.n_train=64", "rollout.sampling.max_new_tokens=6")


class Watch(L.Callback):
    """Keeps the samples, the metrics and, with `evaluates`, the version of a greedy answer of each step."""

    def __init__(self, evaluates):
        self.samples, self.metrics, self.greedy, self.evaluates = [], [], [], evaluates

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.samples.append(outputs["samples"])
        self.metrics.append(outputs["metrics"])
        if not self.evaluates:
            return
        prompt = module.renderer.render([{"role": "user", "content": "sort 3 1 2"}])
        (answer,) = module.generator.generate([prompt], SamplingParams(2, temperature=0.0), 0)
        self.greedy.append((trainer.global_step, answer.policy_version))


def train(tiny, ahead, steps=5, iterations=1, verify=None, teacher=None, engine=None, greedy=True, **options):
    """A few steps of GRPO, or of distillation from a teacher: (module, engine, watch)."""
    model = Pretrained(tiny)
    tokenizer = model.tokenizer()
    renderer = ChatRenderer(tokenizer, model.template_options)
    engine = engine or SlowEngine(tokenizer, **options)
    rollout = StudentRollout(renderer, SamplingParams(6), num_generations=2, num_iterations=iterations, async_steps=ahead)
    objective = Objective(
        completion_mask, token_mean, policy_gradient=PolicyGradient(group_relative, importance_sampling_cap=2.0)
    )
    if teacher is not None:
        objective = Objective(completion_mask, token_mean, divergence=reverse_kl, vocab_support=FullVocabulary())
        teacher.check_tokenizer(tokenizer)
    module = DistillationModule(
        model,
        renderer,
        engine,
        rollout,
        objective,
        {} if teacher is None else {"teacher": teacher},
        Optim(torch.optim.SGD, lr=0.5, schedule="constant"),
        seed=3,
        verify=verify or (lambda example, text: Verdict(len(text) % 5 / 4)),
    )
    data, watch = PromptData(WorldTask().examples("train")[:10], renderer, 4, 3, iterations), Watch(greedy)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps * iterations,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    try:
        trainer.fit(module, data)
    finally:
        module.generator.close()
    return module, engine, watch


def versions(watch):
    return [{sample.policy_version for sample in samples} for samples in watch.samples]


@pytest.mark.parametrize(("ahead", "iterations"), [(0, 1), (1, 1), (2, 1), (1, 2)])
def test_a_rollout_is_as_many_updates_old_as_said(tiny, ahead, iterations):
    _, engine, watch = train(tiny, ahead, iterations=iterations)
    assert versions(watch) == [{max(0, j - ahead) * iterations} for j in range(5)]
    # An evaluation reads the current weights, whatever is being written.
    assert watch.greedy == [((j + 1) * iterations,) * 2 for j in range(5)]
    lags = [row.get("rollout/policy_lag", 0) for row in watch.metrics]
    assert lags == [min(j, ahead) * iterations for j in range(5)]
    assert len([entry for entry in engine.diary if entry.get("greedy") is False]) == 5  # none is written in vain
    assert not [thread for thread in threading.enumerate() if thread.name in ("rollouts", "scores")]


def test_without_overlap_there_is_no_thread(tiny):
    module, engine, _ = train(tiny, 0, steps=2)
    assert type(module.rollouts) is Rollouts and module.generator is engine and module.rollouts.state_dict() == {}
    assert {entry["thread"] for entry in engine.diary} == {"MainThread"}


@pytest.mark.slow
def test_prompts_and_seeds_are_those_of_a_run_without_overlap(tiny):
    asked = []
    for ahead in (0, 1, 3):
        _, engine, watch = train(tiny, ahead, greedy=False)
        asked.append([(e["seed"], e["prompts"]) for e in engine.diary if "seed" in e])
        asked[-1].append([sample.token_ids.tolist() for sample in watch.samples[0]])  # by the same weights
    assert asked[0] == asked[1] == asked[2]


def test_the_ratio_of_old_samples_is_in_the_loss(tiny):
    _, _, watch = train(tiny, 1)
    ratios = [row["train/sampler_ratio"] for row in watch.metrics]
    assert ratios[0] == pytest.approx(1, abs=1e-5) and abs(ratios[2] - 1) > 1e-4


def test_a_rollout_is_written_while_the_one_before_is_learned_from(tiny):
    """Each waits for the other to have begun, so that neither could go on if they took turns."""
    begun, learning = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]
    verdicts = []

    def before(rollout):
        begun[rollout].set()
        assert rollout == 0 or learning[rollout - 1].wait(20), f"rollout {rollout} is not written beside the step before"

    def verify(example, text):
        step = len(verdicts) // 8  # verdicts per step
        learning[step].set()
        assert step == 3 or begun[step + 1].wait(20), f"step {step} is not beside the next rollout"
        verdicts.append(Verdict(len(text) % 5 / 4))
        return verdicts[-1]

    engine = SlowEngine(Pretrained(tiny).tokenizer())
    engine.before = before
    _, _, watch = train(tiny, 1, steps=4, verify=verify, engine=engine, greedy=False)
    assert versions(watch) == [{0}, {0}, {1}, {2}]


@pytest.mark.slow
def test_a_served_teacher_scores_ahead_too(tiny, other):
    class Served(LocalTeacher):
        """A local teacher that counts as served, for it does not change."""

        served = True

        def score(self, samples, max_tokens=None):
            threads.add(threading.current_thread().name)
            return super().score(samples, max_tokens)

    losses = []
    for kind in (LocalTeacher, Served):
        threads: set[str] = set()
        _, _, watch = train(tiny, 1, steps=3, teacher=kind(External(other), NoContext()))
        losses.append([row["train/loss"] for row in watch.metrics])
    assert losses[0] == losses[1] and threads == {"scores"}


def test_an_error_of_the_engine_is_raised_as_it_is(tiny):
    with pytest.raises(RuntimeError, match="the engine is gone"):
        train(tiny, 1, fails_at=3)
    assert not [thread for thread in threading.enumerate() if thread.name in ("rollouts", "scores")]


def test_an_error_of_training_ends_the_thread(tiny):
    def verify(example, text):
        raise RuntimeError("no verdict")

    with pytest.raises(RuntimeError, match="no verdict"):
        train(tiny, 2, verify=verify)
    assert not [thread for thread in threading.enumerate() if thread.name in ("rollouts", "scores")]


def state(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def rollouts(folder):
    """The engine's rollouts by seed: version and prompts, the last one where one was written twice."""
    entries = [json.loads(line) for line in (folder / "diary-0.jsonl").read_text().splitlines()]
    return {e["seed"]: (e["version"], e["prompts"]) for e in entries if e.get("greedy") is False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "ahead"), [("stops_at", 2), *(pytest.param("fails_at", k, marks=pytest.mark.slow) for k in (1, 2))]
)
def test_a_run_that_is_broken_off_goes_on_as_if_it_had_not_been(small, how, ahead):
    """An error of the engine, and SIGINT: rollouts that were written ahead are in the checkpoint, with older weights."""
    parts = (*ENGINE, "method=opd", f"rollout.async_steps={ahead}", "evaluation=none", "callbacks.checkpoint.every=2")
    whole = run(small(*parts, "study.name=whole", "trainer.max_steps=5"))
    broken = (*parts, "study.name=broken", "trainer.max_steps=5")
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        run(small(*broken, f"+generator.{how}=4"))
    folder = run(small(*broken))
    assert len([p for p in folder.glob("diary-0.jsonl")]) > 0 and rollouts(folder) == rollouts(whole)
    a, b = state(whole), state(folder)
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert a["ledger"]["tokens"] == b["ledger"]["tokens"]


@pytest.mark.slow
def test_a_second_interrupt_ends_a_long_rollout(small):
    """The engine's thread does not keep the program, nor its exit."""
    parts = (*ENGINE, "method=opd", "rollout.async_steps=1", "evaluation=none", "+generator.seconds=60")
    timers = [threading.Timer(t, os.kill, (os.getpid(), signal.SIGINT)) for t in (3.0, 3.5)]
    begun = time.perf_counter()
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(small(*parts))
    assert time.perf_counter() - begun < 20
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "rollouts")


def test_saved_runs_without_the_key_are_found_again(small):
    cfg = small("method=opd")
    old = cfg.copy()
    OmegaConf.set_struct(old, False)
    del old.rollout["async_steps"]
    assert run_hash(old) == run_hash(cfg) != run_hash(small("method=opd", "rollout.async_steps=1"))
    assert check(old) == check(cfg)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["generator=transformers"], r"rollout\.async_steps=1: TransformersGenerator writes with the weights"),
        (["generator=vllm", "generator.sleep=true"], r"generator\.sleep=true"),
        (["method=gkd", "rollout=mixture_teacher"], "a teacher writes too"),
        (["method=grpo"], r"loss\.policy_gradient\.importance_sampling_cap=2"),
        (["method=opd_sampled"], r"loss\.vocab_support\.importance_sampling_cap=2"),
        (["rollout.async_steps=-1"], r"rollout\.async_steps=-1 must not be negative"),
    ],
)
def test_what_cannot_be_written_ahead_is_refused(small, overrides, sentence):
    given = ["method=opd", *ENGINE, "rollout.async_steps=1"]
    names = {o.split("=")[0] for o in overrides}
    kept = [o for o in given if o.split("=")[0] not in names and not ("generator" in names and o.startswith("generator."))]
    with pytest.raises(ValueError, match=sentence):
        check(small(*kept, *overrides))


@pytest.mark.parametrize("method", ["opd", "gkd", "grpo"])
def test_what_can_be_written_ahead_is_not_refused(small, method):
    cap = ["loss.policy_gradient.importance_sampling_cap=2"] if method == "grpo" else []
    check(small(f"method={method}", *ENGINE, "rollout.async_steps=1", *cap))


def test_an_engine_without_a_copy_is_refused_by_the_module_too(tiny):
    with pytest.raises(ValueError, match="TransformersGenerator has no copy of the weights"):
        train(tiny, 1, engine=TransformersGenerator(Pretrained(tiny).tokenizer()))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "trainer"), [(0.4, 0.2), (0.2, 0.4)])
def test_twenty_steps_take_as_long_as_the_longer_part(tiny, engine, trainer):
    def verify(example, text):
        time.sleep(trainer / 8)
        return Verdict(len(text) % 5 / 4)

    slow, begun = SlowEngine(Pretrained(tiny).tokenizer(), seconds=engine), []
    slow.before = lambda rollout: begun.append(time.perf_counter())
    module, _, watch = train(tiny, 1, steps=20, verify=verify, engine=slow, greedy=False)
    wall = time.perf_counter() - begun[0]
    parts = slow.spent, module.ledger.seconds["score"] + module.ledger.seconds["update"]
    assert wall <= 1.15 * max(parts), (wall, parts)
    idle = [sum(row[f"rollout/{part}_idle_seconds"] for row in watch.metrics) for part in ("engine", "trainer")]
    assert idle[0] == pytest.approx(max(parts[1] - parts[0], 0), abs=0.15 * wall)
    assert idle[1] == pytest.approx(max(parts[0] - parts[1], 0), abs=0.15 * wall)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_each_of_two_devices_writes_its_own_share_ahead(tiny_run, tmp_path, trainer):  # noqa: F811
    """Over gloo: the versions are right, and the devices' prompts together are those of one device."""
    base = [o for o in tiny_run if not o.startswith(("trainer.max_steps", "task.n_train"))]
    base += [*ENGINE, "method=opd", "rollout.async_steps=1", "evaluation=none", "logger=none", "trainer.max_steps=4"]
    for more in (["study.name=one"], [f"trainer={trainer}", "trainer.devices=2", "study.name=two"]):
        code, output = call(*base, *more)
        assert code == 0, output
    one, two = (next(tmp_path.glob(f"{name}/*/seed-0")) for name in ("one", "two"))

    def prompts(path):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        written = [e for e in entries if e.get("greedy") is False]
        assert [e["version"] for e in written] == [0, 0, 1, 2]
        return [e["prompts"] for e in written]

    shares = zip(prompts(two / "diary-0.jsonl"), prompts(two / "diary-1.jsonl"), strict=True)
    together = [[row for pair in zip(*share, strict=True) for row in pair] for share in shares]
    assert together == prompts(one / "diary-0.jsonl")
