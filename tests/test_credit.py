"""Rewards by episode or by reply: whose tokens have which advantage, and their gradients against a plain reference."""

from functools import partial

import pytest
import torch

from opd_lightning.environments import OpenEnv, openenv
from opd_lightning.losses import Objective
from opd_lightning.losses.advantages import group_relative, leave_one_out, reinforce
from opd_lightning.losses.policy_gradient import PolicyGradient
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.models import Pretrained
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.step.scoring import turn_of_tokens, turn_rewards
from opd_lightning.toy.world import WorldTask
from opd_lightning.types import Rollout, Sample, SamplingParams, Verdict
from tests.test_contracts import Scripted, renderer  # noqa: F401
from tests.test_episodes import Socket
from tests.test_training_step import step

REWARDS = [[0.5, 1.0], [0.0], [0.25, None, 0.75], [1.0, 0.0], [0.0, 0.5], [0.5]]
"""Of the replies of six episodes, three of each of two prompts; None has no verdict of its own."""
EPISODE = [1.0, 0.0, 0.5, 0.25, 0.75, 0.5]
"""The verdicts on them."""


class Played:
    """Episodes of fixed random tokens: replies of two and three tokens by turns, two of the environment's between them."""

    on_policy = True
    student_writes = False
    reads_references = False
    teachers: frozenset[str] = frozenset()
    num_iterations = 1
    sampling = SamplingParams(12, n=3)

    def __init__(self):
        self.samples: list[Sample] = []

    def __call__(self, prompts, seed, generator=None, teachers=None) -> Rollout:
        random = torch.Generator().manual_seed(3)
        for b, rewards in enumerate(REWARDS):
            prompt = prompts.rendered[b // 3].token_ids
            mask = [own for t in range(len(rewards)) for own in [False] * (2 if t else 0) + [True] * (2 + t % 2)]
            ids = torch.cat([torch.tensor(prompt), torch.randint(2, 30, (len(mask),), generator=random)])
            verdicts = [None if reward is None else Verdict(reward) for reward in rewards]
            whole = torch.tensor([False] * len(prompt) + mask)
            example, about = prompts.examples[b // 3], {"verdict": Verdict(EPISODE[b]), "turn_verdicts": verdicts}
            self.samples.append(Sample(example, b // 3, ids, whole, len(prompt), "student", "stop", **about))
        return Rollout(self.samples)


def returns(credit: str) -> torch.Tensor:
    """What each reply answers for, [2, 3, 3], written out."""
    own = torch.tensor([[0.5, 1, 0], [0, 0, 0], [0.25, 0, 0.75], [1, 0, 0], [0, 0.5, 0], [0.5, 0, 0]], dtype=torch.float64)
    rest = torch.tensor([[1.5, 1, 0], [0, 0, 0], [1, 0.75, 0.75], [1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0]], dtype=torch.float64)
    whole = torch.tensor(EPISODE, dtype=torch.float64)[:, None].expand(6, 3)
    return {"episode": whole, "turn": own, "return_to_go": rest}[credit].reshape(2, 3, 3)


ADVANTAGES = {
    "group": (group_relative, lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)),
    "leave_one_out": (leave_one_out, lambda r: (r - r.mean(1, keepdim=True)) * 3 / 2),
    "batch": (reinforce, lambda r: (r - r.mean((0, 1), keepdim=True)) * 6 / 5),
}


@pytest.mark.parametrize(
    ("credit", "name"),
    [("episode", "group"), ("turn", "group"), ("return_to_go", "group"), ("return_to_go", "batch"), ("turn", "leave_one_out")],
)
def test_gradients_are_those_of_each_replys_own_return(tiny, credit, name):
    """Plain autograd in float64 over the same tokens; the environment's have no part in it."""
    advantage, expected_advantage = ADVANTAGES[name]
    played = Played()
    term = PolicyGradient(advantage, None, credit=credit)
    objective = Objective(completion_mask, token_mean, policy_gradient=term)
    _, gradient, _ = step(tiny, objective, rollout=played, dtype="float64")
    advantages = expected_advantage(returns(credit)).flatten(0, 1)
    lm, total, n = Pretrained(tiny, "float64").model(), torch.zeros((), dtype=torch.float64), 0
    for b, sample in enumerate(played.samples):
        log_p = lm(input_ids=sample.token_ids[None]).logits[0].log_softmax(-1)
        reply = -1
        for i in range(sample.prompt_length, len(sample.token_ids)):
            reply += bool(sample.loss_mask[i]) and not bool(sample.loss_mask[i - 1])
            if sample.loss_mask[i]:
                total, n = total - advantages[b, reply] * log_p[i - 1, sample.token_ids[i]], n + 1
    (total / n).backward()
    expected = torch.cat([p.grad.flatten() for p in lm.parameters()])
    assert (gradient - expected).norm() / expected.norm() < 1e-6  # the weights 1/Z and advantages are float32


def test_a_last_reply_without_a_verdict_has_that_of_the_episode():
    mask = torch.tensor([False, True, False, True, True])
    sample = Sample(None, 0, torch.arange(5), mask, 1, "student", "stop", turn_verdicts=(Verdict(0.5),))
    assert turn_of_tokens([sample, sample]).tolist() == [0, 1, 1, 0, 1, 1]
    assert turn_rewards([sample], torch.tensor([0.75]), 3).tolist() == [[0.5, 0.75, 0.0]]


def test_an_unknown_credit_is_refused():
    with pytest.raises(ValueError, match=r"policy_gradient\.credit='token' is unknown; choose episode, turn, return_to_go"):
        PolicyGradient(partial(group_relative), credit="token")


def test_verdicts_on_replies_are_kept_beside_that_of_the_episode(renderer, monkeypatch):  # noqa: F811
    """OpenEnv's rewards: each reply has its own, the episode their sum."""
    rewards = iter([0.5, 0.25, 0.0])
    monkeypatch.setattr(openenv, "connect", lambda url, seconds: Rewarding(rewards))
    make = OpenEnv("http://127.0.0.1:9", observation="text", max_turns=3)
    (example,) = WorldTask(n_train=1, n_eval=1).examples("train")
    (sample,) = Episodes(make, renderer, SamplingParams(20), False).play([example], 0, Scripted(renderer, ["1", "2", "3"]))
    assert [verdict.content for verdict in sample.turn_verdicts] == [0.5, 0.25, 0.0] and sample.verdict.content == 0.75
    assert [turn["role"] for turn in sample.turns] == ["assistant", "user"] * 2
    assert [turn["content"] for turn in sample.turns] == ["1", "red", "2", "red"]


class Rewarding(Socket):
    """A server whose steps have these rewards."""

    def __init__(self, rewards):
        super().__init__()
        self.rewards = rewards

    def recv(self, timeout):
        if self.sent[-1]["type"] == "step":
            self.answer["data"] |= {"reward": next(self.rewards), "done": False}
        return super().recv(timeout)
