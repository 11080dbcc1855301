"""Several nodes: two of them on this machine, started by torchrun or as SLURM starts its tasks, each with one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opd_lightning.config.trainer_arguments import processes_of
from opd_lightning.preflight.devices import STARTED, devices
from opd_lightning.preflight.examine import examine
from opd_lightning.runs.status import is_worker
from opd_lightning.training.run import run

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "examples" / "cluster" / "torchrun.sh"
NODES = ["trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def test_a_batch_is_shared_by_the_processes_of_all_nodes(small):
    cfg = small("trainer=fsdp2", "trainer.devices=2", "trainer.num_nodes=3")
    assert processes_of(cfg.trainer) == cfg.trainer.strategy.data_parallel_size == 6
    assert processes_of(small("trainer.devices=auto").trainer) is None
    found = examine(small("method=kd", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=3"), fast=True)
    told = next(one.text for one in found if one.name == "batch" and one.state == "fail")
    assert told == "data.batch_size=4 is no multiple of trainer.devices=1 x trainer.num_nodes=3; make it one."


def test_a_run_that_nothing_has_started_on_several_nodes_is_refused(small, monkeypatch):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=2, and nothing has started this command on 2 nodes"):
        run(small("method=kd", *NODES))


def test_a_sweep_of_runs_on_several_nodes_is_refused(command):
    code, output, _ = command("-m", "trainer.num_nodes=2", "seed=0,1")
    assert code != 0 and "trainer.devices=1 trainer.num_nodes=2 with -m: each process would repeat the whole sweep" in output


def test_torchruns_rank_is_the_one_that_counts(monkeypatch):
    """Inside of SLURM's tasks its ranks have an order of their own."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert is_worker()
    monkeypatch.setenv("RANK", "0")
    assert not is_worker()


def test_servers_that_other_nodes_do_not_reach_are_refused(small):
    started = ["generator=vllm_server", "generator.start=true", "trainer.num_nodes=2"]
    assert ["generator.host=127.0.0.1" in found.text for found in devices(small(*started)) if found.state == "fail"] == [True]
    assert not [found for found in devices(small(*started, "generator.host=10.0.0.1")) if found.state == "fail"]


# --- two nodes on this machine


def port() -> int:
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(rank: int, at: int) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a node, by the script of the docs."""
    return [str(SCRIPT), "2", str(rank), "1", f"127.0.0.1:{at}"], {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}


def slurm(rank: int, at: int) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of SLURM's task."""
    ids = dict.fromkeys(("SLURM_PROCID", "SLURM_NODEID"), str(rank)) | {"SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "opd"}
    return [sys.executable, "-m", "opd_lightning", *NODES], ids | job | {
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(at),
    }


@pytest.fixture
def base(tiny, other, tmp_path) -> list[str]:
    given = {"model.path": tiny, "model.teacher": other, "output_dir": tmp_path, "trainer.accelerator": "cpu"}
    given |= {"data.batch_size": 4, "task.n_train": 16, "task.n_eval": 8, "logger": "none", "evaluation": "none"}
    return [f"{key}={value}" for key, value in given.items()]


def begin(starter, folder: Path, *overrides: str) -> list[subprocess.Popen]:
    """Both nodes, whose outputs go to files."""
    at, nodes = port(), []
    for rank in range(2):
        command, variables = starter(rank, at)
        with (folder / f"node-{rank}.log").open("w") as log:
            nodes.append(
                subprocess.Popen([*command, *overrides], stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT | variables)
            )
    return nodes


def complete(starter, folder: Path, *overrides: str) -> None:
    """A run on both nodes, to its end."""
    nodes = begin(starter, folder, *overrides)
    codes = [node.wait(timeout=240) for node in nodes]
    assert codes == [0, 0], logs(folder)


def logs(folder: Path) -> list[str]:
    return [(folder / f"node-{rank}.log").read_text() for rank in range(2)]


def trained(folder: Path, study: str) -> dict:
    return torch.load(next(folder.glob(f"{study}/*/seed-0/checkpoints/last.ckpt")), weights_only=True)


def alike(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return all(map(alike, a, b)) if isinstance(a, list) else torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.slow
@pytest.mark.parametrize("starter", [torchrun, slurm])
def test_two_nodes_train_like_one_process(starter, base, small, tmp_path):
    kd = [*base, "method=kd", "trainer.max_steps=3"]
    complete(starter, tmp_path, *kd, "study.name=two")
    run(small(*kd, "study.name=one"))
    one, two = (trained(tmp_path, name)["state_dict"] for name in ("one", "two"))
    assert one.keys() == two.keys() and max((one[key] - two[key]).abs().max() for key in one) < 2e-6
    first, second = logs(tmp_path)
    assert "step 3/3" in first and "step" not in second and "evaluation" not in second  # one node tells


def programs(parent: int) -> Iterator[int]:
    """The runs among a process and its children."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout.split()
    for process in map(int, found):
        if b"opd_lightning" in Path(f"/proc/{process}/cmdline").read_bytes():
            yield process


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_run_with_a_sentence_and_the_same_command_goes_on(lost, base, tmp_path):
    """SIGKILL of one node's process: the other ends within a minute, and the end is that of an unbroken run, to the bit."""
    given = [*base, "method=opd", "trainer=fsdp2", "trainer.max_steps=40", "callbacks.checkpoint.every=5"]
    given = given if lost else [part for part in given if part != "trainer=fsdp2"]
    nodes, deadline = begin(torchrun, tmp_path, *given, "study.name=broken"), time.time() + 120
    while not list(tmp_path.glob("broken/*/seed-0/checkpoints/last.ckpt")) and time.time() < deadline:
        time.sleep(0.05)
    (process,) = programs(nodes[lost].pid)
    os.kill(process, signal.SIGKILL)
    codes = [node.wait(timeout=60) for node in nodes]
    left = logs(tmp_path)[1 - lost]
    assert all(codes) and "another process of this run is gone" in left and "the same command goes on" in left
    complete(torchrun, tmp_path, *given, "study.name=broken")
    complete(torchrun, tmp_path, *given, "study.name=whole")
    states = [trained(tmp_path, name) for name in ("broken", "whole")]
    assert all(alike(*(state[key] for state in states)) for key in ("state_dict", "optimizer_states"))
