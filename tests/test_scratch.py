"""Temporary folders of killed processes are removed by the next one, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_lightning.generation.weight_transfer import FilesTransfer
from opd_lightning.utils.scratch import ScratchFolder

PROCESS = """
import os, signal, sys
from pathlib import Path
from opd_lightning.utils.scratch import ScratchFolder
folder = ScratchFolder("weights-", Path(sys.argv[1]))
(folder.path / "part.safetensors").write_text("1")
print(folder.path, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def process(tmp_path):
    """A process with a folder; it ends by SIGKILL when a line comes."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.folder = Path(child.stdout.readline().strip())
    yield child
    child.kill()
    child.communicate()


def test_a_killed_process_leaves_nothing_for_long_and_a_living_one_keeps_its_folder(process, tmp_path):
    foreign = [tmp_path / "weights-of-someone", tmp_path / "other-x"]
    for folder in foreign:
        folder.mkdir()
    first = ScratchFolder("weights-", tmp_path)
    assert process.folder.is_dir() and first.path.is_dir()
    process.communicate("go\n")
    ScratchFolder("others-", tmp_path).close()
    assert (process.folder / "part.safetensors").is_file()
    second = ScratchFolder("weights-", tmp_path)
    assert not process.folder.exists() and first.path.is_dir() and all(folder.is_dir() for folder in foreign)
    first.close()
    second.close()
    second.close()
    assert sorted(tmp_path.iterdir()) == sorted(foreign)


def test_a_folder_of_another_machine_stays(process, tmp_path, monkeypatch):
    process.communicate("go\n")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    ScratchFolder("weights-", tmp_path).close()
    assert process.folder.is_dir()


def test_a_folder_is_this_users_alone_and_ends_with_its_object(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = ScratchFolder("weights-")
    path = folder.path
    assert path.parent == tmp_path and path.stat().st_mode & 0o77 == 0
    del folder
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [True, False])
def test_weights_are_written_into_such_a_folder(tmp_path, monkeypatch, given):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    transfer, files = FilesTransfer(str(tmp_path) if given else None), []
    assert not list(tmp_path.iterdir())  # nothing before the first weights
    transfer.save([("a", torch.ones(2))], "v1", files)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert folder.name.startswith("opd-lightning-weights-") and (folder / files[0]).is_file()
    transfer.close()
    assert not list(tmp_path.iterdir())
