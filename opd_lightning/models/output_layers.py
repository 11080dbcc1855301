"""The layers behind a model's last block: its final norm and its output layer."""

import copy
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd_lightning.models.backbone import backbone
from opd_lightning.models.loading import reporting
from opd_lightning.models.pretrained import Pretrained, locate


def without_blocks(model: Pretrained) -> PreTrainedModel:
    """A model's embedding, final norm and output layer; the weights of its blocks are not read.

    Raises:
        ValueError: the path holds no such weights.
    """
    config = copy.deepcopy(model.config())
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None):
        config.layer_types = []
    with reporting():
        try:
            place = locate(model.path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=model.dtype, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{model.name} cannot be read ({reason}); give the folder that is served.") from error
    lm, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{model.name} has no {missing[0]}; give the folder that is served.")
    return lm.requires_grad_(False).eval()


def final_norm(lm: PreTrainedModel, name: str) -> nn.Module:
    """The norm behind the last block, of a model without blocks.

    Raises:
        ValueError: there is none, or more than one.
    """
    norms = [m for m in backbone(lm).modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    if len(norms) != 1:
        raise ValueError(
            f"{name}: {type(lm).__name__} has {len(norms)} norms outside of its blocks, where one is expected; take "
            "teacher=remote."
        )
    return norms[0]
