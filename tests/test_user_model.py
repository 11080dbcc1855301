"""A user who is a language model: what it reads, batched and seeded answers, the end of an episode, and runs with it."""

import json
from functools import partial

import pytest
import torch

from opd_lightning.config.limits import limited
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.environments import UserModel, user_model
from opd_lightning.generation import OwnModel
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.resources import memory, plans_of
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.step.log import log_rollout
from opd_lightning.training.run import run
from opd_lightning.types import Cost, Example, Rollout, SamplingParams
from opd_lightning.utils.metrics import StepMetrics
from tests.templates import tokenizer
from tests.test_tools import Judge, Scripted

ASK = "Asked {prompt}. Told {reply}. Go on."


class Says:
    """A user with prepared turns; remembers what it was asked."""

    def __init__(self, *turns: str | None):
        self.turns, self.read, self.seeds = list(turns), [], []

    def __call__(self, chats, seed):
        self.read.append([[turn["content"] for turn in chat] for chat in chats])
        self.seeds.append(seed)
        return [self.turns.pop(0) for _ in chats]


def asked(n: int) -> list[Example]:
    return [Example(str(i), [{"role": "user", "content": f"q{i}"}]) for i in range(n)]


def test_the_user_reads_the_conversation_from_its_side_and_all_are_asked_at_once():
    renderer = ChatRenderer(tokenizer("chatml"))
    user = Says("why?", "DONE.", "sure?")
    player = Episodes(partial(UserModel, Judge(), user, ASK, 2, "DONE"), renderer, SamplingParams(90), False)
    first, second = player.play(asked(2), 3, Scripted(renderer, "4", "3", "5", "6"))
    assert user.read == [
        [["Asked q0. Told 4. Go on."], ["Asked q1. Told 3. Go on."]],
        [["Asked q0. Told 4. Go on.", "why?", "5"]],
    ]
    assert first.metrics["turns"] == 3 and first.verdict is not None and second.metrics["turns"] == 1
    assert len(set(user.seeds)) == len(user.seeds)


def test_an_episode_ends_after_its_turns_or_where_the_user_has_no_room():
    renderer = ChatRenderer(tokenizer("chatml"))
    for turns, replies in ((("why?", "sure?", "never read"), 3), ((None,), 1), (("why?", ""), 2)):
        player = Episodes(partial(UserModel, Judge(), Says(*turns), ASK, 2, "DONE"), renderer, SamplingParams(90), False)
        (sample,) = player.play(asked(1), 0, Scripted(renderer, *["5"] * 3))
        assert sample.metrics["turns"] == replies and sample.finish_reason == "stop" and sample.verdict.content == 1.0


def test_a_user_that_crashes_fails_the_batch_with_its_words():
    def broken(chats, seed):
        raise RuntimeError("out of memory")

    renderer = ChatRenderer(tokenizer("chatml"))
    player = Episodes(partial(UserModel, Judge(), broken, ASK, 2, None), renderer, SamplingParams(90), False)
    with pytest.raises(ValueError, match="every episode failed in its environment, the first for this: RuntimeError: out of"):
        player.play(asked(2), 0, Scripted(renderer, "4", "3"))


def test_a_model_of_its_own_answers_by_its_seed_within_its_window(other):
    user = OwnModel(other, SamplingParams(6))
    chats = [[{"role": "user", "content": f"rotate {i} 4"}] for i in range(5)]
    once = user(chats, 1)
    assert user(chats, 1) == once != user(chats, 2)
    assert user([[{"role": "user", "content": "1 " * 127}], chats[0]], 1)[0] is None
    (_, nothing), (_, cost) = user.write([[{"role": "user", "content": "1 " * 127}], chats[0]], 1)
    assert nothing == Cost() and len(user.renderer.render(chats[0]).token_ids) < cost.tokens and cost.flops > 0
    assert not any(p.requires_grad and p.grad is not None for p in user.lm.parameters()) and user.lm.device == torch.device(
        "cpu"
    )
    with pytest.raises(ValueError, match=r"environment\.user\.path=/no/such"):
        OwnModel("/no/such", SamplingParams(6))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"instruction": "Go on."}, "must have the placeholders"),
        ({"instruction": "{prompt} {answer}"}, "is no format string"),
        ({"max_turns": 0}, "environment.max_turns=0 must be at least 1"),
    ],
)
def test_users_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        user_model(Judge(), Says(), **{"instruction": ASK, **options})


def test_the_users_model_is_counted_in_costs_and_in_the_plan_of_memory(small, other):
    """FLOPs are those of what it wrote; its weights stand beside the student's in every phase."""
    cfg = small(
        "method=grpo", "environment=user_model", f"environment.user.path={other}", "evaluation=none", "data.batch_size=2"
    )
    parts = assemble(cfg, None)
    own, others = plans_of(parts, limited(cfg, parts.task.max_new_tokens))
    assert own.resident["user"] == own.resident["weights"] and all(plan.resident["user"] for _, plan in others)
    (told,) = memory(parts, limited(cfg, parts.task.max_new_tokens))
    assert ", user " in told.text and "the environment's answers come on top" in told.text

    class Costly(Says):
        def write(self, chats, seed):
            return [(text, Cost(3, 5)) for text in self(chats, seed)]

    renderer = ChatRenderer(tokenizer("chatml"))
    player = Episodes(user_model(Judge(), Costly("why?", "DONE.", "sure?"), ASK), renderer, SamplingParams(90), False)
    samples = player.play(asked(2), 3, Scripted(renderer, "4", "3", "5", "6"))
    assert [sample.environment_flops for sample in samples] == [10, 5]
    metrics = StepMetrics(torch.device("cpu"))
    log_rollout(metrics, Rollout(samples), 7)
    assert metrics.totals["flops/environment"] == 15


@pytest.mark.slow
def test_a_resumed_run_with_a_user_is_the_run_without_a_break(small, other, tmp_path):
    """The user's words are drawn from the step and the turn alone; weights are equal bit by bit."""
    cfg = ["method=grpo", "environment=user_model", f"environment.user.path={other}", "environment.max_turns=1"]
    cfg += ["environment.user.sampling.max_new_tokens=4", "environment.instruction='{prompt} {reply}'"]
    cfg += ["rollout.sampling.max_new_tokens=8", "evaluation=episodes", "callbacks.checkpoint.every=1"]
    whole = run(small(*cfg, "trainer.max_steps=2", f"output_dir={tmp_path}/a"))
    for steps in (1, 2):
        broken = run(small(*cfg, f"trainer.max_steps={steps}", f"output_dir={tmp_path}/b"))
    a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((whole / "evaluation.json").read_text())["end"]["new/turns"] > 1
    costs = [json.loads((folder / "ledger.json").read_text())["flops"]["environment"] for folder in (whole, broken)]
    assert costs[0] == costs[1] > 0
