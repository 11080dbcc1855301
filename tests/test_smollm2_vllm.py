"""Updates of SmolLM2 by vLLM, in process and by a server: the mismatch of each, printed; some minutes, `-m vllm -s`."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opd_lightning.models import Pretrained
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.run import run

SMOLLM2 = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm"),
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make smollm2` puts the model there"),
]
RUN = (
    *("~task.n_eval", "model=smollm2", f"model.path={SMOLLM2}", "task=instructions", "evaluation=none", "trainer.max_steps=5"),
    *("optim.lr=1e-4", "optim.warmup_steps=0", "data.batch_size=2", "rollout.sampling.max_new_tokens=12"),
    "+generator.options={enforce_eager: true, max_model_len: 512}",
)
METHODS = {
    "opd": ("method=opd",),
    "sdft-lora": ("method=sdft", "task=facts", "adapter=lora", "adapter.r=4", "optim.lr=1e-3"),
    "grpo": ("method=grpo", r"task.pattern='[\s\S]*[a-m]'", "task.batch_size=2"),
}
ENGINES = {"vllm": ("generator=vllm",), "vllm_server": ("generator=vllm_server", "generator.start=true")}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """An adapter by which the teacher differs from the student's start."""
    lm = get_peft_model(Pretrained(str(SMOLLM2)).model(), LoraConfig(r=2, target_modules=["v_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in lm.named_parameters():
            value.normal_(std=0.05) if "lora_B" in name else None
    folder = tmp_path_factory.mktemp("teacher")
    lm.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_has_the_weights_of_every_update(small, teacher, method, engine):
    folder = run(small(*RUN, *METHODS[method], *ENGINES[engine], f"model.teacher={teacher}"))
    rows = [row for row in read_csv(folder / "metrics.csv") if "generator/mismatch" in row]
    found = [row["generator/mismatch"] for row in rows]
    print(f"\n{method}, {engine}: " + ", ".join(f"{value:.1e}" for value in found))
    assert len(found) == 5 and max(found) < 1e-3
    assert max(row["train/grad_norm"] for row in rows) > 0  # there was something to push
