"""Tiny random models of many architectures, with the world's tokenizer, and the table of what each can be used for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from opd_lightning.config import compose
from opd_lightning.export import export
from opd_lightning.generation.batches import GROUPING, batch_support
from opd_lightning.models import Pretrained
from opd_lightning.toy.world import VOCABULARY, world_tokenizer
from opd_lightning.training.run import run

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"state_size": 4, "expand": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "time_step_rank": 2}
HYBRID = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
VISION = {"depth": 1, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "vocab_size_per_layer_input": len(VOCABULARY),
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [24, 24],
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_oss": EXPERTS,
    "olmo2": {},
    "granite": {"logits_scaling": 8.0},
    "cohere2": {},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "deepseek_v3": EXPERTS
    | {
        "head_dim": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
    },
    "qwen3_next": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 8},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"hidden_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 16},
    "rwkv": {"attention_hidden_size": 16, "context_length": 128},
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 24, "moe_layers": [1], "attention_chunk_size": 64},
    "falcon_h1": HYBRID | {"mamba_d_ssm": 16, "mamba_d_head": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | EXPERTS
    | {"mamba_d_state": 4, "mamba_dt_rank": 2},
    "bamba": HYBRID | {"attn_layer_indices": [1]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1, "adapter_rank": 4}
    | {"mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 8, "chunk_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 24},
    "granitemoehybrid": EXPERTS | HYBRID | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
}
"""What each needs beside `SIZES`."""


def config_of(name: str):
    """A small configuration."""
    if name in ("qwen2_vl", "qwen2_5_vl"):
        text = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        return AutoConfig.for_model(name, text_config=text, vision_config=VISION, tie_word_embeddings=False)
    sizes = SIZES | ARCHITECTURES[name]
    if name == "gpt2":
        sizes = {k: v for k, v in sizes.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    if name.startswith("mamba"):
        sizes = {k: v for k, v in sizes.items() if k not in ("num_attention_heads", "num_key_value_heads")}
    return AutoConfig.for_model(name, **sizes)


def save(name: str, folder: Path, seed: int = 0, **more) -> str:
    """A random model of an architecture in a folder, with the world's tokenizer."""
    torch.manual_seed(seed)
    config = config_of(name)
    for key, value in more.items():
        setattr(config, key, value)
    auto = AutoModelForImageTextToText if name.endswith("_vl") else AutoModelForCausalLM
    model = auto.from_config(config)
    model.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return str(folder)


USES = {
    "opd": ["method=opd"],
    "sdft + LoRA + EMA": [
        "method=sdft",
        "adapter=lora",
        "adapter.r=2",
        "teacher=ema",
        "teacher.rate=0.3",
        "optim.lr=0.01",
    ],
    "grpo": ["method=grpo", "rollout.num_generations=2"],
}
HEADER = ["architecture", *USES, "export", "reload", "note"]


def two_updates(path: str, other: str, folder: Path, batch: int) -> list[str]:
    """The overrides of a run of two small updates, with another model as the teacher."""
    common = {
        "model.path": path,
        "model.teacher": other,
        "output_dir": str(folder / "out"),
        "logger": "none",
        "evaluation": "none",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "data.batch_size": batch,
        "task.n_train": 2 * batch,
        "task.n_eval": 4,
    }
    return [f"{key}={value}" for key, value in common.items()]


def row(name: str, folder: Path) -> list[str]:
    """One architecture's row of the table: every use tried in two updates, and what they left exported and loaded again."""
    path, other = save(name, folder / "student"), save(name, folder / "teacher", seed=1)
    made: list[Path] = []
    given = two_updates(path, other, folder, batch=3)
    cells = [tried(lambda use=use: made.append(run(compose([*given, *use])))) for use in USES.values()]
    exported = [folder / f"exported_{i}" for i in range(len(made))]
    cells.append(tried(lambda: [export(*pair) for pair in zip(made, exported, strict=True)]) if made else "-")
    cells.append(tried(lambda: [same(*map(str, pair)) for pair in zip(made, exported, strict=True)]) if made else "-")
    return [name, *cells, note(path)]


def tried(what: Callable[[], Any]) -> str:
    """works, or the field that a refusal names; anything but a sentence is an error of the test."""
    try:
        what()
    except ValueError as error:
        field = str(error).split("=")[0].split(":")[0]
        assert " " not in field, error
        return f"refused by `{field}`"
    return "works"


def same(first: str, second: str) -> None:
    """Both are the same model, in training too."""
    ids = torch.tensor([[5, 9, 3, 7, 11, 2]])
    with torch.no_grad():
        logits = [Pretrained(path).model()(input_ids=ids).logits for path in (first, second)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def note(path: str) -> str:
    """What is done otherwise for this architecture."""
    try:
        lm = Pretrained(path).model()
    except ValueError:
        return "no causal language model in transformers"
    eager = "eager attention" if lm.config._attn_implementation == "eager" else ""
    return ", ".join(filter(None, [eager, GROUPING.get(batch_support(lm, [5, 9, 3, 7]))])) or "-"


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"|{'|'.join(cells)}|"
