"""What tests share: a random two-layer model on disk with the world's tokenizer, and composed configurations of it."""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.config import compose
from opd_lightning.tasks.world import VOCABULARY, world_tokenizer

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)


def save_tiny(folder: Path, seed: int) -> str:
    """A random model that fits the world's vocabulary; large enough weights that its distributions are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A student."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    """A teacher of the same family with other weights."""
    return save_tiny(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def small(tiny, other, tmp_path):
    """Composes a configuration of a run that takes a second: tiny models, two steps, few prompts, no W&B."""

    def make(*overrides: str):
        given = {o.split("=")[0].lstrip("+~") for o in overrides}
        defaults = {
            "model.path": tiny,
            "model.teacher": other,
            "output_dir": str(tmp_path / "out"),
            "logger": "none",
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 2,
            "data.batch_size": 4,
            "task.n_train": 16,
            "task.n_eval": 8,
        }
        kept = [o for o in overrides if not o.startswith("~")]  # "~key" leaves a default out
        return compose([*(f"{k}={v}" for k, v in defaults.items() if k not in given), *kept])

    return make
