"""Served teachers against a real vLLM server on this machine: the same updates as by the local teacher."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

import pytest
import torch

from opd_lightning.generation.server import check_model, inspection, shape_in
from opd_lightning.generation.server_process import StartedServer, interpreter
from opd_lightning.models import Pretrained
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers.remote import RemoteTeacher
from opd_lightning.training.run import run
from opd_lightning.utils.http import Servers

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm")]
CONNECTOR = {
    "kv_connector": "HiddenStatesFiles",
    "kv_connector_module_path": "opd_lightning.plugins.vllm_hidden",
    "kv_role": "kv_producer",
}


def save(folder, seed: int) -> str:
    """A random Qwen3 whose output layer has a row for each token and no more."""
    source = Pretrained("stand-in://qwen3")
    lm, tokenizer = source.model(), source.tokenizer()
    lm.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(3.0).add_(0.02 * torch.randn_like(p)) if p.dim() > 1 else None
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    return {name: save(root / name, seed) for seed, name in enumerate(("student", "teacher"))}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """A server that gives log-probabilities, and writes hidden states."""
    root = tmp_path_factory.mktemp("server")
    layers = Pretrained(folders["teacher"]).config().num_hidden_layers
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "served_model_name": "teacher",
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
        },
        "kv_transfer_config": CONNECTOR | {"kv_connector_extra_config": {"shared_storage_path": str(root / "states")}},
    }
    started = StartedServer(Path(folders["teacher"]), root / "log", options, {}, interpreter(None), "127.0.0.1", 300.0)
    started.start()
    assert started.wait(400.0, started.gone), started.last_words()
    yield started
    started.stop()


@pytest.fixture
def updates(small, folders):
    """Five updates: the losses, and the weights behind them."""

    def make(*overrides):
        folder = run(small(f"model.path={folders['student']}", f"model.teacher={folders['teacher']}", *FIVE, *overrides))
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        losses = [row["train/loss"] for row in read_csv(folder / "metrics.csv") if "train/loss" in row]
        return losses, torch.cat([value.flatten() for value in state.values()])

    return make


FIVE = ("trainer.max_steps=5", "evaluation=none")


@pytest.mark.parametrize(
    ("method", "served", "local"),
    [
        (("method=opd",), ("teacher=remote_hidden",), ("teacher=external",)),
        (("method=opd_topk", "loss.vocab_support.k=8"), ("teacher=remote",), ("teacher=topk", "teacher.k=20")),
        (("method=opd_sampled",), ("teacher=remote", "teacher.k=0"), ("teacher=external",)),
    ],
    ids=["hidden", "topk", "sampled"],
)
def test_a_served_teacher_is_the_local_one(updates, server, method, served, local):
    losses, weights = updates(*method, *served, f"teacher.servers.urls={server.url}", "study.name=served")
    expected, reference = updates(*method, *local, "study.name=local")
    assert len(losses) == 5 and losses == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(weights, reference, atol=1e-5, rtol=0)


def test_the_weights_that_are_served_are_compared_with_a_local_copy(server, folders):
    tokenizer = Pretrained(folders["student"]).tokenizer()
    RemoteTeacher(Servers(server.url), local=folders["teacher"], tolerance=1e-4).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="serves other weights than"):
        RemoteTeacher(Servers(server.url), local=folders["student"]).check_tokenizer(tokenizer)


def test_a_server_tells_the_shape_of_its_model(server, folders):
    """So another one than the student is noticed whose folder is not seen here, as one by a hub's name."""
    config = Pretrained(folders["teacher"]).config()
    assert shape_in(inspection(server)) == {
        name: getattr(config, name) for name in ("hidden_size", "vocab_size", "num_hidden_layers")
    }
    check_model(server, {"model": "a/hub-id"}, config)
    with pytest.raises(ValueError, match="serves another model, a/hub-id"):
        check_model(server, {"model": "a/hub-id"}, Pretrained("stand-in://llama").config())


@pytest.mark.slow
def test_a_server_killed_while_it_scores_ends_the_run_with_a_sentence(updates, server):
    """Five kills, each behind an update: the same command goes on after a restart, and ends as an unbroken run."""
    overrides = ("method=opd_topk", "loss.vocab_support.k=8", "teacher=remote", "teacher.servers.retries=0")
    expected = updates(*overrides, f"teacher.servers.urls={server.url}", "study.name=unbroken")
    broken = (*overrides, "study.name=broken", "callbacks.checkpoint.every=1")
    for kill in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RemoteTeacher, "score", killing(server, RemoteTeacher.score, 1 if kill < 4 else 0))
            with pytest.raises(ValueError, match="the same command goes on"):
                updates(*broken, f"teacher.servers.urls={server.url}")
        server.start()
        assert server.wait(400.0, server.gone), server.last_words()
    losses, weights = updates(*broken, f"teacher.servers.urls={server.url}")
    assert losses == pytest.approx(expected[0], abs=1e-6)
    torch.testing.assert_close(weights, expected[1], atol=1e-6, rtol=0)


def killing(server, score, after: int):
    """`score`, whose server is killed with SIGKILL while it is asked, behind so many calls."""
    calls, process = iter(range(100)), server.process

    def wrapped(self, samples, max_tokens=None):
        if next(calls) != after:
            return score(self, samples, max_tokens)
        kill = Timer(0.005 * (after % 2), os.killpg, (process.pid, signal.SIGKILL))
        kill.start()
        try:
            return score(self, samples, max_tokens)
        finally:
            kill.join()
            process.wait()

    return wrapped
