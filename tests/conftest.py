"""What tests share: a random two-layer model on disk with the world's tokenizer, and composed configurations of it."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.__main__ import entry
from opd_lightning.config import compose
from opd_lightning.toy.world import VOCABULARY, world_tokenizer
from tests.zoo import save_model, tokenizers

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)


def save_tiny(folder: Path, seed: int, intermediate: int = 32, hidden: int = 16, heads: int = 2) -> str:
    """A random model that fits the world's vocabulary; large enough weights that its distributions are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
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


@pytest.fixture(scope="session")
def paths(tmp_path_factory) -> dict[str, str]:
    """Models by the names of their tokenizers in `zoo.py`, and one more with the first of these."""
    folder = tmp_path_factory.mktemp("zoo")
    names = {"byte_bpe": 0, "unigram": 1, "characters": 2}
    made = {name: save_model(folder / name, tokenizers()[name], seed) for name, seed in names.items()}
    return made | {"other": save_model(folder / "other", tokenizers()["byte_bpe"], 3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of `planted.py`, in which faults are planted."""
    from tests.planted import Folders  # which imports this file

    return Folders(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def no_logs():
    """Nothing is logged meanwhile."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory) -> tuple[str, str]:
    """A student and a teacher in which nothing but logits is as wide as the vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "student", seed=2, intermediate=24), save_tiny(folder / "teacher", seed=3, intermediate=24)


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


@pytest.fixture
def command(capfd, monkeypatch, tiny, other, tmp_path):
    """Runs a command of the program in this process, on tiny models, into tmp_path/out: (exit code, output, files there)."""
    base = {
        "model.path": tiny,
        "model.teacher": other,
        "output_dir": str(tmp_path / "out"),
        "trainer.accelerator": "cpu",
        "data.batch_size": "4",
        "logger": "none",
        "evaluation.every": "100",
    }

    def call(*arguments: str, main: Callable[[], None] = entry, defaults: bool = True) -> tuple[int, str, list[str]]:
        given = {a.split("=")[0] for a in arguments}
        kept = [f"{k}={v}" for k, v in base.items() if k not in given] if defaults else []
        flags, overrides = [a for a in arguments if a.startswith("-")], [a for a in arguments if not a.startswith("-")]
        monkeypatch.setattr(sys, "argv", ["opd_lightning", *flags, *kept, *overrides])
        GlobalHydra.instance().clear()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):  # what the interpreter would print
                print(stop.code, file=sys.stderr)
        captured = capfd.readouterr()
        out = tmp_path / "out"
        files = sorted(p.name for p in out.rglob("*") if p.is_file()) if out.is_dir() else []
        return code, captured.out + captured.err, files

    return call
