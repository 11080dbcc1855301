"""Rollouts ahead of training: the time of two equal parts, and the age of samples for more than one rollout ahead."""

import time

import pytest

from opd_lightning.models import Pretrained
from opd_lightning.types import Completion, Verdict
from tests.slow_engine import SlowEngine
from tests.test_overlap import train, versions


class SleepingEngine(SlowEngine):
    """Writes the same tokens after a sleep; its copy of the weights is their version alone."""

    def update_weights(self, student, version):
        self.version = version
        self.note(pushed=version)

    def draw(self, prompt, sampling, seed):
        return Completion([5, 6, self.tokenizer.eos_token_id], "stop", [-1.0] * 3, self.version)


def share_of_the_longer_part(tiny):
    """The time of 20 steps, 0.3 s of writing and 0.3 s of learning each, by that of the longer part."""
    engine, begun = SleepingEngine(Pretrained(tiny).tokenizer(), seconds=0.3), []
    engine.before = lambda rollout: begun.append(time.perf_counter())

    def verify(example, text):
        time.sleep(0.3 / 8)  # verdicts per step
        return Verdict(len(text) % 5 / 4)

    module, _, watch = train(tiny, 1, steps=20, verify=verify, engine=engine, greedy=False)
    wall = time.perf_counter() - begun[0]
    assert len(begun) == 20 and versions(watch) == [{max(0, j - 1)} for j in range(20)]
    return wall / max(engine.spent, module.ledger.seconds["score"] + module.ledger.seconds["update"])


@pytest.mark.slow
def test_twenty_steps_of_equal_parts_take_hardly_longer_than_one_part(tiny):
    """The worst case, in which each waits for the other; the best of three, for other programs take time too."""
    ratios = []
    while len(ratios) < 3 and min(ratios, default=9.0) > 1.15:
        ratios.append(share_of_the_longer_part(tiny))
    assert min(ratios) <= 1.15, ratios


@pytest.mark.parametrize(
    ("ahead", "iterations"), [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (3, 1), (4, 3)))]
)
def test_samples_are_at_most_so_many_updates_old_as_said_and_say_so(tiny, ahead, iterations):
    """The version of each sample is that of the last weights that the engine had got when it wrote."""
    engine = SleepingEngine(Pretrained(tiny).tokenizer(), seconds=0.01)
    _, _, watch = train(tiny, ahead, steps=6, iterations=iterations, engine=engine, greedy=False)
    assert versions(watch) == [{max(0, j - ahead) * iterations} for j in range(6)]
    had, written = None, []
    for entry in engine.diary:
        had = entry.get("pushed", had)
        if "seed" in entry:
            written.append((entry["version"], had))
    assert len(written) == 6 and all(said == held for said, held in written)
    assert max(row["rollout/policy_lag"] for row in watch.metrics) == min(5, ahead) * iterations
