"""The plan of memory that `check` makes from shapes alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.config.limits import limited
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.memory_plan import Batch
from opd_lightning.preflight.memory_remedies import remedies
from opd_lightning.preflight.resources import memory, plans_of
from opd_lightning.toy.world import world_tokenizer

ROOT = Path(__file__).parents[1]


def planned(cfg):
    parts = assemble(cfg, None)
    return plans_of(parts, limited(cfg, parts.task.max_new_tokens))


def text(cfg) -> str:
    parts = assemble(cfg, None)
    (result,) = memory(parts, limited(cfg, parts.task.max_new_tokens))
    return result.text


def test_sharding_divides_weights_gradients_and_averages(small):
    _, others = planned(small("method=sft"))
    (_, one), (_, copied), (_, spread) = others[:3]
    assert [(way, plan.devices) for way, plan in others[1:]] == [
        (f"trainer={name}", n) for n in (4, 8) for name in ("ddp", "fsdp2")
    ]
    assert copied.resident == one.resident
    assert all(spread.resident[name] * 4 == pytest.approx(one.resident[name]) for name in ("weights", "optimizer"))
    assert one.resident["optimizer"] == 2 * one.resident["weights"] and one.resident["weights"] > 4000


def test_a_teacher_is_spread_with_the_student_and_may_rest_on_the_host(small, monkeypatch):
    cfg = small("method=opd", "teacher.offload=true")
    _, ((_, one), _, (_, spread), *_) = planned(cfg)
    assert spread.resident["teacher"] * 4 == one.resident["teacher"] > 4000
    assert 0 < spread.phases["score"]["gathered teacher"] <= one.resident["teacher"]
    monkeypatch.setattr("opd_lightning.preflight.memory_plan.on_gpu", lambda cfg: True)
    _, ((_, away), *_) = planned(cfg)
    assert away.resident["teacher"] == 0 and away.phases["score"]["gathered teacher"] == one.resident["teacher"]


def test_a_teacher_larger_than_the_student_takes_less_where_it_is_spread(small, tmp_path, monkeypatch):
    """By its shapes alone; on a CPU all of it is loaded first, a GPU never has it as a whole."""
    tokenizer, sizes = world_tokenizer(), {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=32, architectures=["LlamaForCausalLM"], **sizes)
    for saved in (config, tokenizer):
        saved.save_pretrained(tmp_path / "large")
    cfg = small("method=opd", f"model.teacher={tmp_path / 'large'}", "data.batch_size=8")
    _, (*_, (_, copied), (_, spread)) = planned(cfg)
    assert spread.loaded < 0.3 * copied.loaded and spread.peak == pytest.approx(copied.peak, rel=0.1)
    assert spread.remedy(cfg) == "files take most: teacher.dtype=bfloat16, teacher=remote, or a smaller model"
    monkeypatch.setattr("opd_lightning.preflight.memory_plan.on_gpu", lambda cfg: True)
    _, (*_, (_, copied), (_, spread)) = planned(cfg)
    assert spread.peak < 0.3 * copied.peak and "files" not in spread.phases["load"]


@pytest.mark.slow
def test_what_is_trained_decides(small):
    """An adapter has gradients and averages of its own alone; weights in 4 bits take an eighth of 32."""
    full, lora = (planned(small("method=sdft", "teacher=frozen", *more))[0] for more in ([], ["adapter=lora", "adapter.r=1"]))
    assert lora.resident["optimizer"] < 0.3 * full.resident["optimizer"]
    assert full.resident["teacher"] == full.resident["weights"] and lora.resident["teacher"] == 0


def test_what_takes_most_names_a_key(small, monkeypatch):
    monkeypatch.setattr("opd_lightning.preflight.resources.device", lambda cfg: ("GPU", 2 * 10**5))
    cases = {
        "activations take most: model.checkpointing=true": ("method=sft", "max_tokens_per_microbatch=null"),
        "activations take most: a lower max_tokens_per_microbatch": (
            "method=sft",
            "model.checkpointing=true",
            "max_tokens_per_microbatch=512",
            "data.batch_size=16",
        ),
    }
    for expected, words in cases.items():
        assert expected in text(small(*words, "logits_chunk_size=1")), words
    told = text(small("method=sft", "max_tokens_per_microbatch=null"))
    assert "Each of, once loaded: 1 device" in told and "8 devices with trainer=fsdp2" in told


def test_a_remedy_changes_something(small):
    """Also the keys' places: a teacher without a dtype of its own is not told of one."""
    given = small("method=opd", "teacher.dtype=bfloat16", "teacher.offload=true", "model.checkpointing=true", "adapter=lora")
    assert remedies("teacher", given) == "trainer=fsdp2 on more devices, or teacher=remote"
    assert remedies("files", given) == "model.dtype=bfloat16, teacher=remote, or a smaller model"
    assert remedies("activations", given) == "a lower max_tokens_per_microbatch"
    other = small("method=sdft", "teacher=frozen", "optim=adamw_8bit", "generator.pack_weights=false")
    assert remedies("teacher", other) == "trainer=fsdp2 on more devices, or teacher.offload=true"
    assert remedies("files", other) == "a smaller model" and remedies("packed weights", other) == ""
    assert remedies("optimizer", other) == "trainer=fsdp2 on more devices, or adapter=lora"


def test_a_batch_on_more_devices():
    batch = Batch(rows=10, length=50, completion=20, budget=120)
    assert batch.tokens == 100 and batch.on(8).rows == 2 and batch.on(8).tokens == 100
    assert Batch(10, 50, 20, None).tokens == 500 and Batch(10, 50, 20, 10).tokens == 50


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Random models of 25 million weights."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(config)
        with torch.no_grad():  # no completion ends early
            lm.model.embed_tokens.weight[:, 0], lm.model.embed_tokens.weight[1, 0] = 1.0, -1.0
        lm.save_pretrained(folder / name)
        world_tokenizer().save_pretrained(folder / name)
    return folder


CASES = {
    "opd": ["method=opd", "max_tokens_per_microbatch=null", "data.batch_size=16"],
    "sdft_ema": [
        "method=sdft",
        "teacher=ema",
        "model.checkpointing=true",
        "max_tokens_per_microbatch=1024",
        "data.batch_size=16",
    ],
    "grpo_lora": [
        "method=grpo",
        "adapter=lora",
        "rollout.num_generations=8",
        "data.batch_size=8",
        "max_tokens_per_microbatch=1024",
    ],
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_a_fifth_of_the_measured_peak(name, models, tmp_path):
    words = [
        *CASES[name],
        f"model.path={models / 'student'}",
        f"model.teacher={models / 'teacher'}",
        f"output_dir={tmp_path}",
        "logger=none",
    ]
    words += ["trainer.accelerator=cpu", "trainer.max_steps=2", "task.n_train=32", "task.n_eval=4", "evaluation=none"]
    words += ["rollout.sampling.max_new_tokens=64", "callbacks.progress=null", "optim.warmup_steps=0"]
    small = "data.batch_size=2 rollout.sampling.max_new_tokens=4"
    line = [sys.executable, "-m", "tests.memory_of_a_run", small, *words]
    done = subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.2), found
