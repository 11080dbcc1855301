"""Adapters as folders: what PEFT, and the trainers on top of it, leave beside the model that they adapted."""

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
from opd_lightning.models.loading import ANYWHERE, some

log = logging.getLogger(__name__)

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def is_adapter(place: str) -> bool:
    """Is it a folder, or a repository of the hub, with an adapter by PEFT?"""
    return (Path(place) / CONFIG).is_file() if Path(place).is_dir() else _at_the_hub(place)


@lru_cache
def _at_the_hub(place: str) -> bool:
    try:
        return find_adapter_config_file(place) is not None
    except (OSError, ValueError):  # nothing is there at all, which loading says
        return False


def has_tokenizer(place: str) -> bool:
    """Is there a tokenizer beside the adapter? Of a repository that is left to its base."""
    return any((Path(place) / file).is_file() for file in TOKENIZERS)


def base_of(place: str, given: str | None, name: str, option: str) -> str:
    """Path of the model that an adapter is for.

    Args:
        given: what the option of this name says; it goes before what the adapter says.

    Raises:
        FolderError: there is none, or the folder holds a whole model too.
    """
    config = read_json(_config_file(place), name)
    if given is None and (whole := next((file for file in WEIGHTS if (Path(place) / file).is_file()), None)):
        raise FolderError(
            f"{name} holds both a model ({whole}) and an adapter ({CONFIG}), which may be merged into it already; remove "
            f"one of them, or give the adapter's base ({option}=<folder or hub id>)."
        )
    base = given or (config.get("base_model_name_or_path") if isinstance(config, dict) else None)
    if not base:
        raise FolderError(f"{name}: its {CONFIG} names no base_model_name_or_path; give it ({option}=<folder or hub id>).")
    if Path(base).absolute() == Path(place).absolute():
        raise FolderError(f"{name}: the adapter's base is its own folder; give the base ({option}=<folder or hub id>).")
    return str(base)


def _config_file(place: str) -> Path:
    found = Path(place) / CONFIG if Path(place).is_dir() else find_adapter_config_file(place)
    assert found is not None
    return Path(found)


def check(place: str, name: str) -> None:
    """The adapter's own weights are there and whole.

    Raises:
        FolderError: they are not.
    """
    if not Path(place).is_dir():
        return
    found = next((Path(place) / file for file in FILES if (Path(place) / file).is_file()), None)
    if found is None:
        raise FolderError(f"{name} has an {CONFIG} and no {FILES[0]}; download the rest, or give a checkpoint that has both.")
    check_whole(found, name)
    headers([found], name)


def merge(lm: PreTrainedModel, place: str, name: str) -> PreTrainedModel:
    """The base with an adapter's change in its weights, by PEFT's own merge, and without adapter; in place.

    Raises:
        FolderError: the adapter is for another model, cannot be merged, or a weight of it has no place.
    """
    try:
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise FolderError(f"{name} is an adapter, and peft is not installed; run `pip install peft`.") from error
    check(place, name)
    try:
        # The factors of a fresh adapter are drawn, and then replaced.
        with warnings.catch_warnings(record=True) as told, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(place)
            config.inference_mode = True
            ends = lm.get_input_embeddings(), lm.get_output_embeddings()
            wrapped = get_peft_model(lm, config)
            if ends[0].weight is ends[1].weight and ends != (lm.get_input_embeddings(), lm.get_output_embeddings()):
                untie(lm, ends[1], name)
            weights = {_plain(key): value for key, value in load_peft_weights(place, device="cpu").items()}
            result = set_peft_model_state_dict(wrapped, weights)
            check_names(wrapped, weights, result, name)
            merged = wrapped.merge_and_unload(safe_merge=True)
    except FolderError:
        raise
    except Exception as error:  # PEFT raises of every kind, by what the file holds
        reason = next((line for line in str(error).splitlines() if "size mismatch" in line), str(error))
        reason = " ".join(reason.split())[:200]
        raise FolderError(
            f"{name}: PEFT cannot merge this adapter into {lm.config.name_or_path} ({reason}); give the base that it was "
            "trained on, or merge it with the tool that made it."
        ) from error
    for warning in told:  # the others are about choices that were made when it was trained
        ignored, found, _ = str(warning.message).partition(", this might")
        if found and "Unexpected keyword arguments" in ignored:
            log.warning(f"warning: {name}: another version of PEFT made this adapter; {ignored}: ignored.")
    return merged.requires_grad_(True).eval()


def check_names(wrapped: Any, weights: dict[str, torch.Tensor], result: Any, name: str) -> None:
    """Every weight of the adapter went into the model, every factor of the model came from it, and they change something.

    Raises:
        FolderError: one did not.
    """
    kinds = (getattr(wrapped.base_model, "prefix", "lora_"), ".modules_to_save.", "trainable_tokens_delta")
    state = wrapped.state_dict()
    given = {value.data_ptr() for key, value in state.items() if key not in result.missing_keys}  # tied ones are stored once
    own = {key for key in result.missing_keys if any(kind in key for kind in kinds) and state[key].data_ptr() not in given}
    missing = {key.removeprefix("base_model.model.") for key in own}
    unknown = {key.removeprefix("base_model.model.") for key in result.unexpected_keys}
    if missing or unknown:
        what = [f"missing: {some(missing)}"] if missing else []
        what += [f"without a place in it: {some(unknown)}"] if unknown else []
        raise FolderError(
            f"{name}: the adapter does not fit its base, {wrapped.config.name_or_path} ({'; '.join(what)}); give the base that "
            "it was trained on."
        )
    second = [value for key, value in weights.items() if "lora_B" in key]
    if second and not any(torch.any(value) for value in second):
        log.warning(f"warning: {name}: the adapter changes nothing, for all of its second factors are zero; was it trained?")


def untie(lm: PreTrainedModel, head: nn.Module, name: str) -> None:
    """An output layer of its own, for a model whose adapter changes the embedding or that layer alone; saved like that."""
    head.weight = nn.Parameter(head.get_parameter("weight").detach().clone())
    config: Any = lm.config
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    lm.all_tied_weights_keys = {}
    log.warning(f"warning: {name}: the adapter changes the embedding or the output layer, which are one no more.")


def _plain(key: str) -> str:
    """A weight's name without what torch.compile and FSDP put into it."""
    for token in ANYWHERE:
        key = key.replace(token, "")
    return key.replace("base_model.model.module.", "base_model.model.")
