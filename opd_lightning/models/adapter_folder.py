"""Adapter folders: the files that PEFT and trainers on top of it save for an adapter."""

import logging
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from opd_lightning.models.files import WEIGHTS, FolderError, check_whole, headers, read_json
from opd_lightning.models.loading import WRAPPERS, first_names

log = logging.getLogger(__name__)

PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE")
"""Kinds of adapters that add to the input or to the cache and have no weights to merge."""

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(place: str) -> bool:
    """Whether a path is a folder, or a repository of the hub, with an adapter by PEFT."""
    return (Path(place) / CONFIG).is_file() if Path(place).is_dir() else _is_hub_adapter(place)


@lru_cache
def _is_hub_adapter(place: str) -> bool:
    try:
        return find_adapter_config_file(place) is not None
    except (OSError, ValueError):  # no such repository, which loading reports
        return False


def base_of(place: str, configured: str | None, name: str, option: str) -> str:
    """The path of an adapter's base model.

    Args:
        configured: the value of the option, which takes precedence over the adapter's own configuration.

    Raises:
        FolderError: there is none, or the folder also holds a full model.
    """
    config = read_json(_config_file(place), name)
    kind = str(config.get("peft_type"))
    if kind in PROMPTS:
        raise FolderError(
            f"{name} is an adapter of the kind {kind}, which puts vectors before the prompt instead of changing weights; it "
            "cannot be merged, so it is not supported: give an adapter of weights, such as LoRA, or the base itself."
        )
    if configured is None and (model_file := next((file for file in WEIGHTS if (Path(place) / file).is_file()), None)):
        raise FolderError(
            f"{name} holds both a model ({model_file}) and an adapter ({CONFIG}), which may be merged into it already; remove "
            f"one of them, or give the adapter's base ({option}=<folder or hub id>)."
        )
    base = configured or (config.get("base_model_name_or_path") if isinstance(config, dict) else None)
    if not base:
        raise FolderError(f"{name}: its {CONFIG} names no base_model_name_or_path; give it ({option}=<folder or hub id>).")
    if Path(base).absolute() == Path(place).absolute():
        raise FolderError(f"{name}: the adapter's base is its own folder; give the base ({option}=<folder or hub id>).")
    return str(base)


def _config_file(place: str) -> Path:
    path = Path(place) / CONFIG if Path(place).is_dir() else find_adapter_config_file(place)
    assert path is not None
    return Path(path)


def check(place: str, name: str) -> None:
    """Check that the adapter's weight file is there and complete.

    Raises:
        FolderError: it is not.
    """
    if not Path(place).is_dir():
        return
    file = next((Path(place) / file for file in FILES if (Path(place) / file).is_file()), None)
    if file is None:
        raise FolderError(f"{name} has an {CONFIG} and no {FILES[0]}; download the rest, or give a checkpoint that has both.")
    check_whole(file, name)
    headers([file], name)


def merge(lm: PreTrainedModel, place: str, name: str) -> PreTrainedModel:
    """Merge an adapter into the weights of its base by PEFT, in place.

    Raises:
        FolderError: the adapter is for another model, cannot be merged, or a weight of it has no place.
    """
    try:
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise FolderError(f"{name} is an adapter, and peft is not installed; run `pip install peft`.") from error
    check(place, name)
    try:
        # The factors of a fresh adapter are drawn, then replaced.
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(place)
            config.inference_mode = True
            embeddings = lm.get_input_embeddings(), lm.get_output_embeddings()
            adapted = get_peft_model(lm, config)
            if embeddings[0].weight is embeddings[1].weight and embeddings != (
                lm.get_input_embeddings(),
                lm.get_output_embeddings(),
            ):
                untie(lm, embeddings[1], name)
            weights = {_plain(key): value for key, value in load_peft_weights(place, device="cpu").items()}
            result = set_peft_model_state_dict(adapted, weights)
            check_names(adapted, weights, result, name)
            merged = adapted.merge_and_unload(safe_merge=True)
    except FolderError:
        raise
    except Exception as error:  # PEFT raises many kinds of errors for damaged files
        reason = next((line for line in str(error).splitlines() if "size mismatch" in line), str(error))
        reason = " ".join(reason.split())[:200]
        raise FolderError(
            f"{name}: PEFT cannot merge this adapter into {lm.config.name_or_path} ({reason}); give the base that it was "
            "trained on, or merge it with the tool that made it."
        ) from error
    for warning in caught:  # other warnings concern its training
        notice, matched, _ = str(warning.message).partition(", this might")
        if matched and "Unexpected keyword arguments" in notice:
            log.warning(f"warning: {name}: another version of PEFT made this adapter; {notice}: ignored.")
    return merged.requires_grad_(True).eval()


def check_names(wrapped: Any, weights: dict[str, torch.Tensor], result: Any, name: str) -> None:
    """Check that every weight of the adapter is loaded, every factor of the model is set, and the change is not zero.

    Raises:
        FolderError: a weight is left over or missing.
    """
    kinds = (getattr(wrapped.base_model, "prefix", "lora_"), ".modules_to_save.", "trainable_tokens_delta")
    state = wrapped.state_dict()
    loaded = {value.data_ptr() for key, value in state.items() if key not in result.missing_keys}  # tied ones are stored once
    unset = {key for key in result.missing_keys if any(kind in key for kind in kinds) and state[key].data_ptr() not in loaded}
    missing = {key.removeprefix("base_model.model.") for key in unset}
    unknown = {key.removeprefix("base_model.model.") for key in result.unexpected_keys}
    if missing or unknown:
        parts = [f"missing: {first_names(missing)}"] if missing else []
        parts += [f"without a place in it: {first_names(unknown)}"] if unknown else []
        raise FolderError(
            f"{name}: the adapter does not fit its base, {wrapped.config.name_or_path} ({'; '.join(parts)}); give the base "
            "that it was trained on."
        )
    lora_b = [value for key, value in weights.items() if "lora_B" in key]
    if lora_b and not any(torch.any(value) for value in lora_b):
        log.warning(f"warning: {name}: the adapter changes nothing, for all of its second factors are zero; was it trained?")


def untie(lm: PreTrainedModel, head: nn.Module, name: str) -> None:
    """Untie the output layer from the embedding, where an adapter changes only one of them; saved models stay untied."""
    head.weight = nn.Parameter(head.get_parameter("weight").detach().clone())
    config: Any = lm.config
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    lm.all_tied_weights_keys = {}
    log.warning(f"warning: {name}: the adapter changes the embedding or the output layer, which are one no more.")


def _plain(key: str) -> str:
    """A weight's name without the prefixes of torch.compile and FSDP."""
    for token in WRAPPERS:
        key = key.replace(token, "")
    return key.replace("base_model.model.module.", "base_model.model.")
