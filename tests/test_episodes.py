"""Episodes in runs: every method learns from them, and they are measured, shown and resumed."""

import json

import pytest
import torch

from opd_lightning.config import compose
from opd_lightning.config.compatibility import check
from opd_lightning.environments import OpenEnv, openenv
from opd_lightning.evaluation import EpisodeAccuracy
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.toy.lookup import lookup
from opd_lightning.toy.world import WorldTask
from opd_lightning.training.run import run
from opd_lightning.types import SamplingParams
from tests.test_contracts import Scripted, renderer  # noqa: F401

PLAYED = ["environment=calculator", "rollout.sampling.max_new_tokens=8", "evaluation=episodes"]
METHODS = ["grpo", "opd", "sdft", "sdpo", "grpo_opd", "opsd", "opd_topk", "rloo"]


def measured(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["end"]


def test_a_run_is_measured_by_episodes_and_shows_conversations(small):
    folder = run(small("method=grpo", *PLAYED, "callbacks.samples.every=1", "evaluation.suite.episodes.temperature=1"))
    row, end = read_csv(folder / "metrics.csv")[-1], measured(folder)
    for name in ("turns", "environment_tokens", "failed"):
        assert f"rollout/{name}" in row and f"new/{name}" in end
    assert 1 <= row["rollout/turns"] <= 2 and {"new/accuracy", "prior/accuracy", "new/length", "new/truncated"} <= set(end)
    texts = [json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(text.startswith("student: ") and "\nenvironment: " in text for text in texts if "\n" in text)
    answers = json.loads((folder / "outcomes.json").read_text())["episodes"].values()
    assert any("\nenvironment: " in answer["answer"] for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_the_same_episodes(small, method):
    folder = run(small(f"method={method}", *PLAYED, "trainer.max_steps=1"))
    row = read_csv(folder / "metrics.csv")[-1]
    episodes = 4 * compose([f"method={method}"]).rollout.num_generations
    assert row["rollout/turns"] >= 1 and row["cost/student_tokens"] == pytest.approx(row["rollout/length"] * episodes)


def test_evaluations_that_play_nothing_are_said():
    (warning,) = [w for w in check(compose(["method=grpo", "environment=calculator"])) if "environment" in w]
    assert "evaluation=episodes does" in warning
    assert not [w for w in check(compose(["method=grpo", *PLAYED])) if "play" in w]
    with pytest.raises(ValueError, match="evaluation=episodes plays an environment, and environment=single_turn is none"):
        EpisodeAccuracy(WorldTask(), None, 8)


def test_the_lookup_of_the_embedded_world(renderer):  # noqa: F811
    """It answers with the operation on what the student passes on, and the task judges the second reply."""
    task = WorldTask(n_train=1, n_eval=1)
    (example,) = task.examples("train")
    digits, right = example.messages[0]["content"].split()[1:], " ".join(example.extra["digits"])
    passed, listed = " ".join(digits), " , ".join(example.extra["digits"])
    for replies, score, seen in (
        ([f"answer {passed}", f"answer {right}"], 1.0, f"[ result {listed} ]"),
        ([f"answer {passed}", f"answer {passed}"], 0.0, f"[ result {listed} ]"),
        (["answer 1", f"answer {right}"], 1.0, "[ red ]"),
    ):
        episodes = Episodes(lookup(task), renderer, SamplingParams(16), False)
        (sample,) = episodes.play([example], 0, Scripted(renderer, replies))
        assert sample.verdict.content == score and seen in renderer.decode(sample.token_ids)
        assert sample.metrics["tool_errors"] == float("red" in seen)
        assert renderer.decode(sample.token_ids[: sample.prompt_length]) == f"copy rotate {passed} ="
    cfg = compose(["environment=lookup", "method=opd"])
    assert cfg.rollout.sampling.max_new_tokens == 16


class Socket:
    """A server of OpenEnv in this process: echoes, and rewards a reply with 7."""

    def __init__(self):
        self.sent, self.answers, self.closed = [], [], False

    def send(self, text):
        message = json.loads(text)
        self.sent.append(message)
        data = message.get("data", {})
        if message["type"] == "reset":
            self.answer = {"type": "observation", "data": {"observation": {"text": "sort 3 1"}, "done": False}}
        elif message["type"] == "step" and data["message"] == "4":
            self.answer = {"type": "error", "data": {"message": "no fours"}}
        elif message["type"] == "step":
            done = "7" in data["message"]
            self.answer = {
                "type": "observation",
                "data": {"observation": {"text": "red"}, "reward": float(done), "done": done},
            }

    def recv(self, timeout):
        assert timeout == 60.0
        return json.dumps(self.answer)

    def close(self):
        self.closed = True


def test_an_episode_of_openenv(renderer, monkeypatch):  # noqa: F811
    """Its protocol: reset and step over one connection, whose rewards are the verdict."""
    sockets = []
    monkeypatch.setattr(openenv, "connect", lambda url, seconds: sockets.append(Socket()) or sockets[-1])
    make = OpenEnv("http://127.0.0.1:9", observation="text", action={"kind": "say"})
    some = list(WorldTask(n_train=2, n_eval=1).examples("train"))
    episodes = Episodes(make, renderer, SamplingParams(20, n=2), False)
    samples = episodes.play(some, 0, Scripted(renderer, ["1", "7", "4", "2", "7", "2 7"]))
    assert [s.verdict.content for s in samples] == [1.0, 1.0, 0.0, 1.0] and all(socket.closed for socket in sockets)
    assert "no fours" in samples[2].verdict.feedback and samples[2].metrics["failed"] == 1
    seeds = [socket.sent[0]["data"]["seed"] for socket in sockets]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert sockets[0].sent[1] == {"type": "step", "data": {"kind": "say", "message": "1"}}
    assert samples[0].example.messages[-1]["content"].endswith("\n\nsort 3 1")
    assert renderer.decode(samples[0].token_ids[samples[0].prompt_length :]) == "1 red = 7"


def test_a_run_whose_environment_judges_needs_no_verifier(small, monkeypatch, tmp_path):
    monkeypatch.setattr(openenv, "connect", lambda url, seconds: Socket())
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"copy {i}"}) for i in range(30)))
    cfg = ["task=table", f"task.path={tmp_path}/rows.jsonl", "environment=openenv", "environment.urls=http://127.0.0.1:9"]
    cfg += ["environment.observation=text", "environment.max_turns=2", "task.max_new_tokens=12"]
    folder = run(small("method=grpo", *cfg, "evaluation=episodes", "trainer.max_steps=1"))
    assert "rollout/reward" in read_csv(folder / "metrics.csv")[-1] and "new/accuracy" in measured(folder)


@pytest.mark.parametrize(("options", "sentence"), [({"urls": "x"}, "is no URL"), ({"seconds": 0}, "seconds=0 must be")])
def test_options_of_openenv_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        OpenEnv(**{"urls": "http://a:1", **options})


@pytest.mark.slow
def test_a_resumed_run_of_episodes_is_the_run_without_a_break(small, tmp_path):
    """Replies of later turns are drawn from the step and the turn alone: weights are equal bit by bit."""
    cfg = ["method=grpo", "environment=calculator", "rollout.sampling.max_new_tokens=8", "evaluation=none"]
    cfg += ["callbacks.checkpoint.every=1"]
    whole = run(small(*cfg, "trainer.max_steps=2", f"output_dir={tmp_path}/a"))
    for steps in (1, 2):
        broken = run(small(*cfg, f"trainer.max_steps={steps}", f"output_dir={tmp_path}/b"))
    a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
