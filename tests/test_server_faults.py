"""vLLM servers killed in the middle of a run: it goes on, or ends with a sentence and is resumed; minutes, make test-vllm."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from opd_lightning.config import compose
from opd_lightning.generation.server_process import StartedServer
from opd_lightning.module import DistillationModule
from opd_lightning.runs.status import read_status
from opd_lightning.training.run import run
from opd_lightning.utils.http import Server
from tests.conftest import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm")]
STEPS = 5
PLACES = {"rollout": "/inference/v1/generate", "push": "/update_weights"}
PROCESS = [0]
"""The process of a server by URL."""
OPTIONS = {"enforce_eager": True, "max_model_len": 128, "distributed_executor_backend": "uni"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # with "uni" a server on the CPU is two processes in place of three


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[str, str]:
    """A student and a teacher whose heads have a size that vLLM's attention knows."""
    root = tmp_path_factory.mktemp("models")
    folders = [save_tiny(root / str(seed), seed, hidden=32, heads=1) for seed in (0, 1)]
    return folders[0], folders[1]


@pytest.fixture
def arguments(start, tmp_path):
    """The command line of a run of a few updates with a checkpoint after each."""
    return [
        f"model.path={start[0]}",
        f"model.teacher={start[1]}",
        f"output_dir={tmp_path}/out",
        "logger=none",
        "trainer.accelerator=cpu",
        f"trainer.max_steps={STEPS}",
        "data.batch_size=4",
        "task.n_train=32",
        "task.n_eval=4",
        "evaluation.every=100",
        "callbacks.checkpoint.every=1",
        "optim.lr=0.01",
        "rollout.sampling.max_new_tokens=8",
        "generator=vllm_server",
        "++generator.options={enforce_eager: true, max_model_len: 128, distributed_executor_backend: uni}",
        "generator.patience=200",
    ]


def served(start, folder: Path, port: int | None = None) -> StartedServer:
    """A server as a user starts it, which the run does not own."""
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "logprobs_mode": "processed_logprobs"}
    settings |= {"enable_scale_out": True, "weight_transfer_config": {"backend": "files"}} | OPTIONS
    server = StartedServer(Path(start[0]), folder / "server.log", settings, {}, sys.executable, "127.0.0.1", 60)
    server.start(port)
    assert server.wait(200, server.gone), server.last_words()
    return server


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def kill(monkeypatch, place: str, steps: set[int]) -> list[int]:
    """Kill the server once in each of these updates (from 1), while it works on a request; returns where it was killed."""
    post, train, armed, killed = Server.post, DistillationModule.training_step, [0], []

    def training_step(self, *args):
        armed[0] = self.global_step + 1
        return train(self, *args)

    def killing(self, path, body=None, timeout=None):
        if path == PLACES[place] and armed[0] in steps and "prompt_logprobs" not in str(body):
            killed.append(armed[0])
            armed[0] = 0
            os.killpg(self.process.pid if isinstance(self, StartedServer) else PROCESS[0], signal.SIGKILL)
        return post(self, path, body, timeout)

    monkeypatch.setattr(Server, "post", killing)
    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    return killed


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The weights of a run in which nothing happens."""
    return {}


def expected(unbroken, arguments) -> dict[str, torch.Tensor]:
    """The weights of the unbroken run, made once."""
    if not unbroken:
        unbroken.update(weights(run(compose([*arguments, "generator.start=true", "study.name=unbroken"]))))
    return unbroken


def same(found: dict[str, torch.Tensor], known: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(known) and all(torch.equal(found[name], known[name]) for name in known)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_when_its_server_is_killed(place, arguments, unbroken, monkeypatch):
    known = expected(unbroken, arguments)
    killed = kill(monkeypatch, place, {1, 2, 3, 4, 5})
    folder = run(compose([*arguments, "generator.start=true", f"study.name={place}"]))
    assert killed == [1, 2, 3, 4, 5] and read_status(folder)["state"] == "finished"
    assert same(weights(folder), known)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_whose_server_by_url_is_killed_ends_with_a_sentence_and_is_resumed(
    place, start, arguments, unbroken, monkeypatch, tmp_path
):
    known, server = expected(unbroken, arguments), served(start, tmp_path)
    url, port = server.url, int(server.url.rpartition(":")[2])
    PROCESS[0] = server.process.pid
    cfg = compose([*arguments, f"generator.urls=[{url}]", "generator.patience=1", f"study.name=url-{place}"])
    with monkeypatch.context() as patch:
        killed = kill(patch, place, {3})
        with pytest.raises(ValueError, match=rf"{url} does not answer \(.*start it again\. Then the same command goes on"):
            run(cfg)
    assert killed == [3]
    server.stop()
    server = served(start, tmp_path, port)
    try:
        folder = run(cfg)
    finally:
        server.stop()
    assert read_status(folder)["state"] == "finished" and same(weights(folder), known)


KILLED_TRAINER = """
import os, signal
from opd_lightning.utils.http import Server
from opd_lightning.__main__ import entry
post, seen = Server.post, [0]
def killing(self, path, body=None, timeout=None):
    seen[0] += path == "/finish_weight_update"
    if seen[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return post(self, path, body, timeout)
Server.post = killing
entry()
"""


def test_a_trainer_killed_in_the_middle_of_a_push_goes_on_with_the_same_server(start, arguments, unbroken, tmp_path):
    known, server = expected(unbroken, arguments), served(start, tmp_path)
    given = [*arguments, f"generator.urls=[{server.url}]", "study.name=trainer"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", KILLED_TRAINER, *given], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert server.get("/is_paused") == {"is_paused": True}
        folder = run(compose(given))
        assert server.get("/is_paused") == {"is_paused": False}
    finally:
        server.stop()
    assert read_status(folder)["state"] == "finished" and same(weights(folder), known)
