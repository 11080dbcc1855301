"""Teachers and averages under trainer=fsdp2: each device has its part; and a teacher that rests on the host."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from opd_lightning.data.batching import collate
from opd_lightning.models import Frozen, Pretrained, Student
from opd_lightning.models.sharding import Sharding, full_tensor, text_layers
from opd_lightning.teachers.fingerprint import Fingerprint
from tests.conftest import save_tiny
from tests.test_commands import call
from tests.test_long_texts import ragged


@pytest.fixture(scope="module")
def alone():
    """The devices of a process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def batches() -> list:
    return [collate([sample], 0, torch.device("cpu")) for sample in ragged()]


def frozen(folder: str, *more) -> Frozen:
    return Frozen(Pretrained(folder).model(), 256, None, torch.device("cpu"), *more)


@pytest.mark.parametrize("offload", [False, True])
def test_a_spread_model_reads_and_writes_like_a_whole_one(alone, other, offload):
    whole, spread = frozen(other), frozen(other, alone, offload)
    spread.verify_head("teacher.path")
    assert all(isinstance(p, DTensor) for p in spread.parameters())
    one, two = (model.read(batches()) for model in (whole, spread))
    assert all(isinstance(p, DTensor) for p in spread.parameters())
    assert torch.allclose(one.hidden, two.hidden, atol=1e-6) and torch.allclose(
        one.chunk(slice(None)).logits, two.chunk(slice(None)).logits, atol=1e-5
    )
    with spread.eval_mode() as lm, whole.eval_mode() as expected:  # as for writing
        assert torch.allclose(lm(batches()[0].input_ids).logits, expected(batches()[0].input_ids).logits, atol=1e-5)
        assert torch.equal(spread.read(batches()).hidden, two.hidden)


def test_scores_of_a_spread_student_outlive_its_whole_weights(alone, tiny):
    """Also of one whose head is not trained, as under an adapter."""
    whole, spread = (Student(Pretrained(tiny).model()).requires_grad_(False) for _ in range(2))
    spread.sharding = alone
    fully_shard(spread, mesh=alone.mesh)
    one, two = (model.read(batches()).chunk(slice(None)).logits for model in (whole, spread))
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_a_fingerprint_has_a_layer_of_a_spread_model_at_a_time(alone, other, offload):
    whole, spread, seen = frozen(other), frozen(other, alone, offload), []
    layers = text_layers(spread.lm)
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(
            lambda *_: seen.append(sum(not isinstance(next(one.parameters()), DTensor) for one in layers))
        )
    found = [Fingerprint.of("teacher.path", model) for model in (whole, spread)]
    assert seen == [1] * len(layers) and len(layers) > 1 and found[1].difference(found[0].numbers) < 1e-5
    assert all(isinstance(p, DTensor) for p in spread.parameters())


def test_devices_with_fewer_batches_read_a_token_instead(alone, other, monkeypatch):
    spread = frozen(other, alone)
    monkeypatch.setattr(alone, "most", lambda number: 5)
    assert len(spread.evened(batches())) == 5 and spread.evened(batches())[-1].input_ids.shape == (1, 1)
    assert torch.allclose(spread.read(batches()).hidden, frozen(other).read(batches()).hidden, atol=1e-6)
    with spread.eval_mode():
        assert len(spread.evened(batches())) == 3  # whole around it: nobody waits


def test_a_part_of_a_tensor_is_this_devices(alone):
    part = alone.own(full := torch.randn(5, 2))
    assert isinstance(part, DTensor) and part.placements == (Shard(0),) and torch.equal(full_tensor(part), full)
    assert alone.own(part) is part and alone.most(3) == 3


def test_an_offloaded_model_is_on_its_device_only_while_it_is_read(other, monkeypatch):
    """Where it is moved, and what its scores hold; that a GPU's memory is free in between needs a GPU."""
    moves: list[str] = []
    monkeypatch.setattr(Frozen, "to", lambda self, place: moves.append(str(place)) or self)
    model = frozen(other, None, True)
    assert moves == ["cpu"]  # Lightning may have loaded it on the GPU
    moves.clear()
    model.place = torch.device("cuda")
    with model.eval_mode():
        assert moves == ["cuda"]
        model.read(batches())
    assert moves == ["cuda", "cpu"]
    scores = model.read(batches())
    assert moves == ["cuda", "cpu"] * 2
    logits = scores.chunk(slice(None)).logits
    model.lm.get_output_embeddings().weight.zero_()  # the scores have a head of their own
    assert torch.equal(scores.chunk(slice(None)).logits, logits)


# --- runs of two devices


CASES = {
    "external": ["method=opd"],
    "offloaded": ["method=opd", "teacher.offload=true"],
    "start": ["method=sdft", "teacher=frozen"],
    "writes": ["method=seqkd", "rollout.sampling.temperature=0"],
    "average": ["method=sdft", "teacher=ema", "teacher.rate=0.3"],
    "average of factors": ["method=sdft", "teacher=ema", "teacher.rate=0.3", "teacher.of=factors", "adapter=lora"],
    "average of an adapter": ["method=sdft", "teacher=ema", "teacher.rate=0.3", "adapter=lora"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_of_two_devices_has_half_of_the_teacher(case, tiny, tmp_path):
    """The teacher is larger than the student; the trained weights are those of one device, whatever passes each one needs."""
    large = save_tiny(tmp_path / "large", seed=5, hidden=64, intermediate=256)
    given = {"model.path": tiny, "model.teacher": large, "output_dir": tmp_path, "trainer.accelerator": "cpu"}
    given |= {"data.batch_size": 8, "task.n_train": 16, "task.n_eval": 8, "logger": "none", "evaluation": "none"}
    given |= {"trainer.max_steps": 3, "optim.lr": 1e-2, "+callbacks.held._target_": "tests.held.Held"}
    line = [*CASES[case], *(f"{key}={value}" for key, value in given.items())]
    if case != "writes":
        line += ["generator._target_=tests.given.GivenEngine"]
        line += [f"~generator.{key}" for key in ("drop_finished", "share_prefill", "pack_weights")]
    states, found = [], []
    for name, way in {"one": [], "two": ["trainer=fsdp2", "trainer.devices=2", "max_tokens_per_microbatch=30"]}.items():
        code, output = call(*line, *way, f"study.name={name}")
        assert code == 0, output
        folder = next(tmp_path.glob(f"{name}/*/seed-0"))
        states.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))
        found.append([json.loads(path.read_text()) for path in sorted(folder.glob("held-*.json"))])
    one, two = found
    for rank in two:
        assert rank["teacher"]["whole"] == one[0]["teacher"]["here"]
        assert 0.4 < rank["teacher"]["here"] / rank["teacher"]["whole"] < 0.6
        assert "average" in case or case == "start" or rank["teacher"]["whole"] > 2 * rank["student"]["whole"]
    assert all(a[1] == b[1] for a, b in zip(two[0]["passes"], two[1]["passes"], strict=True))
    if case == "external":  # one device has fewer micro-batches than the other
        assert any(read < made for rank in two for read, made in rank["passes"])
    a, b = (torch.cat([state["state_dict"][name].flatten() for name in sorted(state["state_dict"])]) for state in states)
    assert (a - b).norm() < 1e-6 * a.norm()
