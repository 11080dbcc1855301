"""The grid: one device, micro-batches, DDP and FSDP2 give the same weights after three updates on given completions."""

import pytest
import torch

from opd_lightning.config import compose
from opd_lightning.training.run import run
from tests.test_commands import call

WAYS = {
    "micro-batches": ["max_tokens_per_microbatch=50"],
    "ddp": ["trainer=ddp", "trainer.devices=2", "max_tokens_per_microbatch=50"],
    "fsdp2": ["trainer=fsdp2", "trainer.devices=2", "max_tokens_per_microbatch=50"],
}
METHODS = {
    "opd": ["method=opd"],
    "sdft": ["method=sdft", "teacher=ema", "teacher.rate=0.3"],
    "grpo": ["method=grpo", "rollout.num_generations=4"],
}
ADAPTERS = {"full": ["optim.lr=1e-3"], "lora": ["adapter=lora", "adapter.r=2", "optim.lr=1e-2"]}


def trained(folder) -> torch.Tensor:
    """The trained weights, and the teacher's average, as one vector."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    averages = [state.get("average", {}) for state in saved["teachers"].values()]
    assert saved["global_step"] == 3
    return torch.cat([part[name].double().flatten() for part in (saved["state_dict"], *averages) for name in sorted(part)])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_all_ways_give_the_weights_of_one_device(tiny, other, tmp_path, method, adapter):
    shared = [*METHODS[method], *ADAPTERS[adapter], "generator._target_=tests.given.GivenEngine", "evaluation=none"]
    shared += [f"~generator.{key}" for key in ("drop_finished", "share_prefill", "pack_weights")]
    shared += [f"model.path={tiny}", f"model.teacher={other}", f"output_dir={tmp_path}", "trainer.accelerator=cpu"]
    shared += ["data.batch_size=4", "task.n_train=16", "task.n_eval=8", "logger=none", "trainer.max_steps=3"]
    for name, way in {"one": ["max_tokens_per_microbatch=null"], **WAYS}.items():
        if len(way) == 1:
            run(compose([*shared, *way, f"study.name={name}"]))
            continue
        code, output = call(*shared, *way, f"study.name={name}")
        assert code == 0, output
    one, *others = (trained(next(tmp_path.glob(f"{name}/*/seed-0"))) for name in ("one", *WAYS))
    far = {name: float((found - one).norm() / one.norm()) for name, found in zip(WAYS, others, strict=True)}
    assert max(far.values()) < 1e-6, far
