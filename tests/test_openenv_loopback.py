"""An OpenEnv server on loopback: the protocol over a real connection, episodes side by side, and runs that learn from them."""

import json
import threading
import time

import pytest

from opd_lightning.environments import OpenEnv
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.toy.world import WorldTask
from opd_lightning.training.run import run
from opd_lightning.types import SamplingParams
from tests.test_contracts import Scripted, renderer  # noqa: F401

pytest.importorskip("websockets", reason="needs the extra openenv")


def serve(socket) -> None:
    """One session: asks for a digit, rewards each reply by its number of even digits, ends with the second.

    "9 9 9" hangs, "7 7 7" ends the connection, and "5 5 5" has a reward that is no number.
    """
    steps = 0
    for text in socket:
        message = json.loads(text)
        if message["type"] == "close":
            return
        if message["type"] == "reset":
            answer = {"observation": {"text": f"sort {message['data']['seed'] % 10}"}, "reward": None, "done": False}
        else:
            steps += 1
            said = message["data"]["message"]
            if "9 9 9" in said:
                time.sleep(3)
            if "7 7 7" in said:
                return
            even = sum(word in "02468" for word in said.split())
            answer = {"observation": {"text": f"{even % 10}"}, "reward": min(even, 4) / 8, "done": steps == 2}
            answer |= {"reward": float("nan")} if "5 5 5" in said else {}
        socket.send(json.dumps({"type": "observation", "data": answer}))


@pytest.fixture
def url():
    """A server in a thread."""
    from websockets.sync.server import serve as served

    with served(serve, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def test_episodes_over_a_real_connection(url, renderer):  # noqa: F811
    """One that waits too long fails alone, with its words kept; rewards are of each reply and of the whole."""
    make = OpenEnv(url, observation="text", seconds=0.5)
    some = list(WorldTask(n_train=3, n_eval=1).examples("train"))
    replies = ["2 4", "9 9 9", "1", "6", "3"]
    samples = Episodes(make, renderer, SamplingParams(30), False).play(some, 0, Scripted(renderer, replies))
    assert [s.verdict.content for s in samples] == [0.375, 0.0, 0.0] and [s.metrics["failed"] for s in samples] == [0, 1, 0]
    assert [v.content for v in samples[0].turn_verdicts] == [0.25, 0.125]
    assert "TimeoutError" in samples[1].verdict.feedback


def test_servers_that_die_or_answer_nonsense_fail_their_episodes_alone(url, renderer):  # noqa: F811
    """One of two servers is gone from the beginning; of the other one connection breaks, and one reward is NaN."""
    make = OpenEnv([url, "http://127.0.0.1:9"], observation="text", seconds=0.5)
    some = list(WorldTask(n_train=6, n_eval=1).examples("train"))
    replies = ["7 7 7", "1", "5 5 5", "1", "2 4", "1", "6"]
    samples = Episodes(make, renderer, SamplingParams(30), False).play(some, 0, Scripted(renderer, replies))
    assert [s.metrics["failed"] for s in samples] == [1, 1, 1, 1, 0, 1] and samples[4].verdict.content == 0.375
    assert [s.include_in_loss for s in samples] == [True, False] * 3 and not any(s.verdict.content for s in samples[:4])
    said = [s.verdict.feedback for s in samples]
    assert "ConnectionClosed" in said[0] and "reward is nan" in said[2] and "refused" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["episode", "return_to_go"])
def test_five_updates_on_loopback(url, small, tmp_path, credit):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"copy {i}"}) for i in range(30)))
    cfg = ["task=table", f"task.path={tmp_path}/rows.jsonl", "environment=openenv", f"environment.urls={url}"]
    cfg += ["environment.observation=text", "rollout.sampling.max_new_tokens=24", "trainer.max_steps=5"]
    folder = run(small("method=grpo", *cfg, f"loss.policy_gradient.credit={credit}", "evaluation=episodes"))
    rows = read_csv(folder / "metrics.csv")
    assert [row["step"] for row in rows][-1] == 5 and all(row["rollout/failed"] == 0 for row in rows[1:])
    assert any(row["rollout/reward"] > 0 for row in rows[1:]) and any(row["train/skipped"] == 0 for row in rows[1:])
    assert json.loads((folder / "evaluation.json").read_text())["end"]["new/turns"] > 0
