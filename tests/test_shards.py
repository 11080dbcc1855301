"""Sharded checkpoints of trainer=fsdp2: two devices over gloo, resumed on one and back; damage and code are refused."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from opd_lightning.callbacks.checkpoint import check_checkpoint, damage
from opd_lightning.export import export
from opd_lightning.models import Pretrained, shards
from opd_lightning.utils.errors import explain
from tests.test_commands import call

FSDP2 = ["trainer=fsdp2", "trainer.strategy.save_distributed_checkpoint=true"]
WAYS = {
    "two": [*FSDP2, "trainer.devices=2"],
    "one": [*FSDP2, "trainer.devices=1"],
    "default": ["trainer=default"],
    "ddp": ["trainer=ddp", "trainer.devices=2"],
    "file": ["trainer=fsdp2", "trainer.devices=2"],
}


@pytest.fixture
def alone():
    """A process group of this process, and its mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def written(alone, tmp_path) -> tuple[Path, dict]:
    """A sharded checkpoint on disk, and what it holds."""

    def sharded(*shape: int):
        return distribute_tensor(torch.randn(shape), alone, [Shard(0)])

    state = {"exp_avg": sharded(5, 2), "step": torch.tensor(3.0)}
    content = {name: {} for name in ("lr_schedulers", "loops", "callbacks")}
    content |= {"state_dict": {"student.a": sharded(5, 2), "student.b": torch.ones(2)}}
    content |= {"optimizer_states": [{"state": {0: state}, "param_groups": [{"params": [0, 1]}]}]}
    full = {"a": content["state_dict"]["student.a"].full_tensor(), "exp_avg": state["exp_avg"].full_tensor()}
    shards.write(content, tmp_path / "shards-3")
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", full


def test_shards_are_read_without_other_devices(written):
    path, full = written
    content = shards.whole(torch.load(path, weights_only=True), path.parent)
    assert content["state_dict"]["student.b"].eq(1).all() and shards.KEY not in content
    state = content["optimizer_states"][0]["state"][0]
    assert state["step"] == 3 and torch.equal(state["exp_avg"], full["exp_avg"])
    assert torch.equal(shards.weights(path)["student.a"], full["a"]) and damage(path) is None


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_shard_is_refused(written, name):
    path, _ = written
    shard = path.parent / "shards-3" / name
    broken = bytearray(shard.read_bytes())
    broken[len(broken) // 2] ^= 1
    shard.write_bytes(broken)
    with pytest.raises(ValueError, match=f"last.ckpt is damaged .*{name} is not what was written"):
        check_checkpoint(path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.*remove it to begin the run anew"):
        check_checkpoint(path)


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("thing", [Harmful(), torch.load, pickle.loads], ids=["call", "load", "loads"])
def test_a_description_of_shards_cannot_run_code(written, thing):
    path, _ = written
    (path.parent / "shards-3" / ".metadata").write_bytes(pickle.dumps(thing))
    with pytest.raises(pickle.UnpicklingError, match="is no part of a description"):
        shards.weights(path)


def test_shards_of_a_partial_write_are_replaced_and_removed(alone, tmp_path):
    (tmp_path / "shards-3").mkdir()
    (tmp_path / "shards-3" / "__7_0.distcp").write_text("of a run that was killed")
    weight = distribute_tensor(torch.ones(4), alone, [Shard(0)])
    shards.write({"state_dict": {"a": weight}, "optimizer_states": []}, tmp_path / "shards-3")
    assert {path.name for path in (tmp_path / "shards-3").iterdir()} == {".metadata", "__0_0.distcp"}
    shards.write({"state_dict": {"a": weight}, "optimizer_states": []}, tmp_path / "shards-5")
    shards.remove_others(tmp_path, [5])
    assert [path.name for path in tmp_path.iterdir()] == ["shards-5"]


def test_a_full_disk_is_told_as_such(alone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", full)
    weight = distribute_tensor(torch.ones(4), alone, [Shard(0)])
    with pytest.raises(OSError, match="No space left") as caught:
        shards.write({"state_dict": {"a": weight}, "optimizer_states": []}, tmp_path / "shards-3")
    assert "Make room" in explain(caught.value)


# --- runs of two devices


@pytest.fixture
def base(tiny, other, tmp_path) -> list[str]:
    given = {"model.path": tiny, "model.teacher": other, "output_dir": tmp_path, "trainer.accelerator": "cpu"}
    given |= {"data.batch_size": 4, "task.n_train": 16, "task.n_eval": 8, "logger": "none", "evaluation": "none"}
    given |= {"method": "kd", "max_tokens_per_microbatch": 60}
    return [f"{key}={value}" for key, value in given.items()]


def made(base: list[str], folder: Path, study: str, way: str, steps: int, *more: str) -> Path:
    """The run's folder, after so many updates."""
    code, output = call(*base, *WAYS[way], *more, f"study.name={study}", f"trainer.max_steps={steps}")
    assert code == 0, output
    return next(folder.glob(f"{study}/*/seed-0"))


def contents(run_folder: Path) -> dict:
    """The checkpoint with full tensors."""
    path = run_folder / "checkpoints" / "last.ckpt"
    return shards.whole(torch.load(path, weights_only=True), path.parent)


def tensors(state: dict, *path: str):
    """The tensors in a nested state, by path."""
    for name, value in state.items():
        if torch.is_tensor(value):
            yield (*path, name), value
        elif isinstance(value, dict):
            yield from tensors(value, *path, name)


def distance(a: dict, b: dict) -> float:
    """The greatest difference of weights, of teachers and of optimizer states between checkpoints."""
    assert a["state_dict"].keys() == b["state_dict"].keys()
    found = [(a["state_dict"][name] - b["state_dict"][name]).abs().max() for name in a["state_dict"]]
    one, two = ([t for _, t in sorted(tensors(c["teachers"]))] for c in (a, b))
    found += [(x - y).abs().max() for x, y in zip(one, two, strict=True)]
    one, two = (c["optimizer_states"][0] for c in (a, b))
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for at, state in one["state"].items():
        assert state.keys() == two["state"][at].keys() and len(state) == 3
        found += [(torch.as_tensor(state[k]) - torch.as_tensor(two["state"][at][k])).abs().max() for k in state]
    return float(torch.stack(found).max())


LORA = ["adapter=lora", "adapter.r=2", "optim.lr=0.01"]
EMA = ["method=sdft", "rollout=dataset", "teacher=ema", "teacher.rate=0.3"]
CASES = {"full": [], "lora": LORA, "ema": EMA, "ema_lora": [*EMA, *LORA]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("others", [("one", "default"), ("default", "file"), ("ddp", "one")])
def test_a_sharded_checkpoint_resumes_on_another_number_of_devices_and_back(base, tmp_path, case, others):
    for way, steps in zip(("two", *others, "two"), (1, 2, 3, 4), strict=True):
        folder = made(base, tmp_path, "moved", way, steps, *CASES[case])
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert files == (["last.ckpt", f"shards-{steps}"] if way in ("one", "two") else ["last.ckpt"])
    straight = made(base, tmp_path, "straight", "default", 4, *CASES[case])
    assert distance(contents(folder), contents(straight)) < 3e-6


@pytest.mark.slow
def test_both_forms_hold_the_same_and_export_the_same(base, tmp_path):
    kept = ["callbacks.checkpoint.keep=2", "callbacks.checkpoint.every=1"]
    sharded, file = (made(base, tmp_path, way, way, 2, *kept) for way in ("two", "file"))
    assert distance(contents(sharded), contents(file)) == 0
    names = {path.name for path in (sharded / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "step-1.ckpt", "shards-1", "shards-2"}
    files = {path.name for path in (sharded / "checkpoints" / "shards-2").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    exported = [export(folder, tmp_path / f"model-{folder.parts[-3]}") for folder in (sharded, file)]
    models = [Pretrained(str(folder)).model().state_dict() for folder in exported]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    again = made(base, tmp_path, "two", "two", 3, *kept)
    assert {path.name for path in (again / "checkpoints").iterdir()} == {"last.ckpt", "step-2.ckpt", "shards-2", "shards-3"}


@pytest.mark.slow
def test_a_damaged_or_foreign_sharded_checkpoint_ends_the_run_and_an_intact_one_goes_on(base, narrow, tmp_path):
    kept = ["callbacks.checkpoint.keep=2", "callbacks.checkpoint.every=1"]
    folder = made(base, tmp_path, "broken", "two", 2, *kept) / "checkpoints"
    whole = (folder / "shards-2" / "__1_0.distcp").read_bytes()
    (folder / "shards-2" / "__1_0.distcp").write_bytes(whole[:-9])
    again = [*base, *WAYS["two"], *kept, "study.name=broken", "trainer.max_steps=3"]
    code, output = call(*again)
    assert code != 0 and "is damaged" in output and "step-1.ckpt" in output
    os.replace(folder / "step-1.ckpt", folder / "last.ckpt")
    end = made(base, tmp_path, "broken", "two", 3, *kept)
    assert distance(contents(end), contents(made(base, tmp_path, "straight", "two", 3))) == 0
    foreign = made(base, tmp_path, "foreign", "two", 2, f"model.path={narrow[0]}") / "checkpoints"
    for name in ("last.ckpt", "shards-2"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
        os.replace(foreign / name, folder / name)
    for way in ("two", "default"):
        code, output = call(*base, *WAYS[way], "study.name=broken", "trainer.max_steps=4")
        assert code != 0 and "is of another model: its student" in output
