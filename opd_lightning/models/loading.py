"""Loading of pretrained weights: what the folder holds is what the model has, name by name and shape by shape."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from opd_lightning.models.files import FolderError, headers, weight_files

log = logging.getLogger(__name__)

Reader = Callable[[dict[str, str] | None], tuple[PreTrainedModel, dict[str, Any]]]

ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into names wherever they wrap."""

LEADING: tuple[str, ...] = ("module.", "_forward_module.", "student.", "lm.", "llm.", "pretrained_model.")
LEADING += ("base_model.model.", "language_model.", "model.language_model.")
"""What DDP, DeepSpeed, this package, TRL, PEFT and vision models put before names; of the last, "model." stays."""

ELSEWHERE = re.compile(
    r"^(model\.)?(visual|vision_tower|vision_model|vision_embed_tokens|multi_modal_projector|audio_tower|embed_vision|embed_audio|"
    r"mtp|mtp_layers|v_head|value_head|summary)\."
)
"""Parts beside the language model: other senses, heads that guess several tokens, and value heads."""


def load(place: str, name: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal language model of a folder or hub id, with all of its weights from there.

    Args:
        place: the folder or hub id.
        name: the field and its value, for errors.

    Raises:
        FolderError: a weight is missing, of another shape or has no place in the model, or a file is damaged.
    """
    if Path(place).is_dir():
        headers(weight_files(place, name), name)

    auto: Any = AutoModelForCausalLM

    def read(mapping: dict[str, str] | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        return auto.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; they are refused here
            key_mapping=mapping,
        )

    model, said = checked(read, name)
    for sentence in [*said, *check_values(model, name)]:
        log.warning(f"warning: {sentence}")
    return model


def preview(place: str, name: str) -> list[str]:
    """Whether a folder's weights fit its configuration, from their names and shapes alone.

    Returns:
        What loading will warn of, a sentence each.

    Raises:
        FolderError: as loading would.
    """
    if not Path(place).is_dir():
        return []  # a hub id, whose files come with the loading
    files = weight_files(place, name)
    shapes = headers(files, name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    if not files or getattr(config, "quantization_config", None) is not None:
        return []
    return checked(lambda mapping: compared(config, shapes, mapping), name)[1]


def compared(
    config: PretrainedConfig, shapes: Mapping[str, torch.Size], mapping: dict[str, str] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers would say of weights with these shapes: it loads tensors without values into a model without."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    kind: Any = type(blank)
    return kind.from_pretrained(
        None,
        config=blank.config,
        state_dict=state,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        key_mapping=mapping,
    )


def checked(read: Reader, name: str) -> tuple[PreTrainedModel, list[str]]:
    """A model whose weights all come from where it was read, and sentences on what was set right.

    Raises:
        FolderError: they do not.
    """
    with reporting() as reports:
        try:
            model, info = read(None)
            stripped = wrappers(info["unexpected_keys"], set(model.state_dict()), model.base_model_prefix)
            if stripped:
                model, info = read(stripped)
                # transformers would put the prefixes back when it saves.
                used: list[Any] = getattr(model, "_weight_conversions", None) or []
                kept: Any = [change for change in used if not set(stripped) & set(change.source_patterns)]
                model._weight_conversions = kept
        except RuntimeError as error:
            if failed := [line.split(" ")[0] for text in reports for line in text.splitlines() if "| CONVERSION" in line]:
                raise FolderError(
                    f"{name}: its weights cannot be put together as its config.json says, {some(set(failed))}; a part of them "
                    "may be missing: give the folder as it was saved, complete."
                ) from error
            raise
    said = []
    if stripped:
        tokens = dict.fromkeys(re.sub(r"\^|\\|\(\?:\)", "", pattern) for pattern in stripped)
        said.append(f"{name}: the names of its weights have {', '.join(tokens)} before or in them, which is left out.")
    beside = {key for key in info["unexpected_keys"] if ELSEWHERE.match(key)}
    if beside:
        said.append(f"{name}: {some(beside)}: no part of {type(model).__name__}, left out.")
    if problems := faults(info, info["unexpected_keys"] - beside):
        raise FolderError(
            f"{name} does not hold the {type(model).__name__} that its config.json describes: {'; '.join(problems)}; "
            f"{remedy(info)}"
        )
    return model, said


def faults(info: dict[str, Any], unexpected: set[str]) -> list[str]:
    """What is missing, of another shape, or too much."""
    found = []
    if info["missing_keys"]:
        found.append(f"missing and to be drawn at random: {some(info['missing_keys'])}")
    if info["mismatched_keys"]:
        key, has, wants = min((k, tuple(has), tuple(wants)) for k, has, wants in info["mismatched_keys"])
        more = len(info["mismatched_keys"]) - 1
        also = f", and {more} more" if more else ""
        found.append(f"of another shape: {key} is {list(has)} where {list(wants)} is meant{also}")
    if unexpected:
        found.append(f"without a place in the model: {some(unexpected)}")
    return found


def remedy(info: dict[str, Any]) -> str:
    """The end of the sentence."""
    if any("lora_" in key or "base_layer" in key for key in info["unexpected_keys"]):
        return "merge the adapter (PEFT's merge_and_unload) and save the result, or give the adapter's own folder."
    if info["missing_keys"] == {"lm_head.weight"}:
        return (
            "save the model with its output layer (AutoModelForCausalLM), or set tie_word_embeddings in config.json where "
            "that layer is the embedding."
        )
    return "give the folder as it was saved, complete and with the config.json that belongs to it."


def some(keys: set[str], n: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(sorted(keys)[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")


def wrappers(unexpected: set[str], expected: set[str], backbone: str) -> dict[str, str]:
    """The known prefixes that keep weights from their places, as patterns and replacements for transformers.

    Args:
        expected: names of the model's weights.
        backbone: the model's own prefix, which transformers adds where it is missing.
    """
    found: dict[str, str] = {}
    for key in sorted(unexpected):
        steps: dict[str, str] = {}
        rest = key
        while not expected & {rest, f"{backbone}.{rest}"}:
            if (step := next_step(rest)) is None:
                break
            pattern, replacement, rest = step
            while pattern in steps:
                pattern += "(?:)"  # each takes a prefix away once
            steps[pattern] = replacement
        else:
            found |= steps
    return found


def next_step(key: str) -> tuple[str, str, str] | None:
    """The first wrapper of a name: pattern, replacement, and the name without it."""
    for token in ANYWHERE:
        if token in key:
            return re.escape(token), "", key.replace(token, "", 1)
    for prefix in LEADING:
        if key.startswith(prefix):
            new = "model." if prefix == "model.language_model." else ""
            return f"^{re.escape(prefix)}", new, new + key.removeprefix(prefix)
    return None


def check_values(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Sentences on matrices of zeros, as half a download may leave them.

    Raises:
        FolderError: a weight is not finite.
    """
    blank = set()
    for key, value in model.named_parameters():
        if not value.is_floating_point() or not value.numel() or value.element_size() == 1:
            continue
        low, high = (bound.item() for bound in value.detach().aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise FolderError(
                f"{name}: {key} has values that are not finite; download it again, or give an earlier checkpoint."
            )
        if low == high == 0 and value.ndim > 1 and not key.endswith("bias") and not ELSEWHERE.match(key):
            blank.add(key)
    if blank:
        yield f"{name}: {some(blank)}: nothing but zeros; where that is not meant, download it again."


@contextmanager
def reporting() -> Iterator[list[str]]:
    """Keeps transformers from printing tables of what is said here in a sentence or set right; they are collected."""
    reports: list[str] = []

    def quiet(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text and "seem corrupted" not in text:
            return True
        reports.append(text)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(quiet)
    try:
        yield reports
    finally:
        logger.removeFilter(quiet)
