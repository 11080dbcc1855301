"""Waits for servers: one signal ends them, saves the last update, and leaves no thread that the program waits for."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from opd_lightning.training.run import Stopped, run
from opd_lightning.utils.http import Servers
from opd_lightning.utils.interrupts import Interrupted, end_waits, end_waits_when, interruptible
from tests.served import Served

REMOTE = ("method=opd_topk", "loss.vocab_support.k=8", "teacher=remote", "trainer.max_steps=3", "evaluation=none")


def hang(number: int, signalled: int | None = None):
    """A server's `fail` that, from a request on, sends this process a signal and does not answer."""
    sent = []

    def fail(n: int) -> None:
        if n < number:
            return
        if signalled is not None and not sent:
            sent.append(threading.Timer(0.1, os.kill, (os.getpid(), signalled)))
            sent[0].start()
        time.sleep(30)

    return fail


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_teacher_and_the_run_goes_on_as_if_it_had_not(small, other, number):
    before = signal.getsignal(number)
    one, two = Served(other), Served(other)
    whole = run(small(*REMOTE, f"teacher.servers.urls={one.url}", "study.name=whole"))
    per_step = 4  # requests, one for each sample
    hanging, begun = Served(other), time.monotonic()
    hanging.fail = hang(one.requests - per_step - 1, number)
    cfg = small(*REMOTE, f"teacher.servers.urls={hanging.url}", "study.name=broken")
    with pytest.raises(Stopped, match=r"the same command goes on from update [12]") as stop:
        run(cfg)
    assert stop.value.code == 128 + number and time.monotonic() - begun < 20
    assert signal.getsignal(number) == before
    folder = run(small(*REMOTE, f"teacher.servers.urls={two.url}", "study.name=broken"))
    known = weights(whole)
    assert all(torch.equal(value, known[name]) for name, value in weights(folder).items())
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_one_interrupt_ends_a_command_whose_teacher_hangs(tiny, other, tmp_path):
    server = Served(other)
    server.fail = hang(1)
    line = [f"model.path={tiny}", f"model.teacher={other}", f"output_dir={tmp_path}", "trainer.accelerator=cpu", "logger=none"]
    command = [sys.executable, "-m", "opd_lightning", *REMOTE, *line, f"teacher.servers.urls={server.url}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not server.requests and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=15)
    assert process.returncode == 130 and "the same command goes on" in output and "Traceback" not in output


def test_requests_are_daemons_and_a_signal_leaves_only_waits(other):
    server = Served(other)
    server.fail = hang(1)
    asked = threading.Event()
    end_waits_when(asked.is_set)
    previous = signal.signal(signal.SIGUSR1, lambda *_: (asked.set(), end_waits()))
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            Servers(server.url).post_all("/x", [{}] * 3)
        assert time.monotonic() - begun < 5
        end_waits()  # outside of a wait nothing is raised
        with pytest.raises(Interrupted), interruptible():
            raise AssertionError("a wait that begins after the signal")
    finally:
        signal.signal(signal.SIGUSR1, previous)
        end_waits_when(None)
