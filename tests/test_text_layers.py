"""The layers that trainer=fsdp2 shards one by one are those of the text model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from opd_lightning.models.sharding import text_layers
from tests.architectures import ARCHITECTURES, SIZES, config_of

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {name: value for name, value in SIZES.items() if name != "tie_word_embeddings"}
QUICK = ("llama", "gpt2", "mixtral")


@pytest.mark.parametrize(
    ("name", "text", "tower"), [("gemma3", "gemma3_text", "siglip_vision_model"), ("llava", "llama", "clip_vision_model")]
)
def test_a_tower_of_more_layers_is_not_taken(name, text, tower):
    vision = AutoConfig.for_model(tower, **TOWER, num_hidden_layers=5)
    config = AutoConfig.for_model(
        name, text_config=AutoConfig.for_model(text, **TEXT).to_dict(), vision_config=vision.to_dict()
    )
    with torch.device("meta"):
        lm = AutoModelForImageTextToText.from_config(config)
    layers = text_layers(lm)
    names = [key for key, module in lm.named_modules() if any(module is layer for layer in layers)]
    assert len(layers) == 2 and all("language_model.layers." in key for key in names), names


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if not n.endswith("_vl")]
)
def test_experts_and_other_lists_are_not_taken(name):
    """Each layer has parameters of its own, and together they have all but embeddings, norms and the output layer."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config_of(name))
    layers = text_layers(lm)
    assert len(layers) == lm.config.get_text_config().num_hidden_layers
    assert all(sum(p.numel() for p in layer.parameters()) > 100 for layer in layers)
