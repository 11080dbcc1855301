"""Random models for run.py: a student and a teacher with the embedded world's tokenizer, in folders."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.toy.world import VOCABULARY, world_tokenizer

FULL = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
FULL |= {"num_attention_heads": 16, "num_key_value_heads": 8}
SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2}


def save_models(folder: Path, small: bool) -> tuple[str, str]:
    """The folders of student and teacher, which are made where they are missing."""
    folders = [folder / "student", folder / "teacher"]
    for seed, path in enumerate(folders):
        if (path / "config.json").is_file():
            continue
        torch.manual_seed(seed)
        shared = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "max_position_embeddings": 1024}
        shared |= {"tie_word_embeddings": True, "initializer_range": 0.3 if small else 0.05}
        config = LlamaConfig(**(SMALL if small else FULL), **shared)
        LlamaForCausalLM(config).save_pretrained(path)
        world_tokenizer().save_pretrained(path)
    return str(folders[0]), str(folders[1])
