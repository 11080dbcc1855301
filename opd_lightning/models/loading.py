"""Loading of pretrained weights, with a check that names and shapes in the folder are those of the model."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from opd_lightning.models.files import FolderError, check_floats, differ, headers, weight_files

log = logging.getLogger(__name__)

Reader = Callable[[dict[str, str] | None], tuple[PreTrainedModel, dict[str, Any]]]

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Prefixes of torch.compile, FSDP and activation checkpointing, anywhere in names."""

PREFIXES: tuple[str, ...] = ("module.", "_forward_module.", "student.", "lm.", "llm.", "pretrained_model.")
PREFIXES += ("base_model.model.", "language_model.", "model.language_model.")
"""Prefixes of DDP, DeepSpeed, this package, TRL, PEFT and vision models; of the last, "model." is kept."""

OTHER_PARTS = re.compile(
    r"^(model\.)?(visual|vision_tower|vision_model|vision_embed_tokens|multi_modal_projector|audio_tower|embed_vision|embed_audio|"
    r"mtp|mtp_layers|v_head|value_head|summary)\."
)
"""Parts beside the language model: vision and audio, multi-token heads and value heads."""


def load(place: str, name: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal language model of a folder or hub id, with all of its weights.

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

    model, warnings = checked(read, name)
    if untied(model):
        warnings.append(apart(name))
        untie(model)
    for sentence in [*warnings, *check_values(model, name)]:
        log.warning(f"warning: {sentence}")
    return model


def preview(place: str, name: str) -> list[str]:
    """Check a folder's weights against its configuration, by names and shapes alone.

    Returns:
        The warnings of loading, a sentence each.

    Raises:
        FolderError: as loading would.
    """
    if not Path(place).is_dir():
        return []  # a hub id, whose files are fetched on loading
    files = weight_files(place, name)
    shapes = headers(files, name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    if not files or getattr(config, "quantization_config", None) is not None:
        return []
    check_floats(files, name)
    model, warnings = checked(lambda mapping: compared(config, shapes, mapping), name)
    for pair in model.all_tied_weights_keys.items():
        stored = [key for weight in pair for key in shapes if f".{key}".endswith(ending(weight))]
        if len(stored) == 2 and differ(files, stored[0], stored[1]):
            return [*warnings, apart(name)]
    return warnings


def ending(weight: str) -> str:
    """The last two parts of a weight's name, which prefixes in a file leave alone."""
    return "." + ".".join(weight.split(".")[-2:])


def untied(model: PreTrainedModel) -> set[str]:
    """The weights that the configuration ties and that transformers left apart, for the files hold two values."""
    return set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(model.all_tied_weights_keys)


def untie(model: PreTrainedModel) -> None:
    """Write into the configuration that output layer and embedding are two, so that exports and engines keep both."""
    config: Any = model.config
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False


def apart(name: str) -> str:
    """The warning on a folder whose configuration ties two weights that differ."""
    return (
        f"{name}: its config.json says tie_word_embeddings=true, and its output layer differs from its embedding; both are "
        "used as they are, and trained apart. Where one matrix is meant, remove the other from the folder; else set "
        "tie_word_embeddings=false there."
    )


def compared(
    config: PretrainedConfig, shapes: Mapping[str, torch.Size], mapping: dict[str, str] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and loading report of transformers for weights with these shapes, on the meta device."""
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
    """A model with all of its weights from `read`, and warnings on renamed and left-out weights.

    Raises:
        FolderError: a weight is missing, of another shape or left over.
    """
    with reporting() as reports:
        try:
            model, info = read(None)
            stripped = wrappers(info["unexpected_keys"], set(model.state_dict()), model.base_model_prefix)
            if stripped:
                model, info = read(stripped)
                # transformers would put the prefixes back when it saves.
                conversions: list[Any] = getattr(model, "_weight_conversions", None) or []
                others: Any = [change for change in conversions if not set(stripped) & set(change.source_patterns)]
                model._weight_conversions = others
        except RuntimeError as error:
            if failed := [line.split(" ")[0] for text in reports for line in text.splitlines() if "| CONVERSION" in line]:
                raise FolderError(
                    f"{name}: its weights cannot be put together as in its config.json, {first_names(set(failed))}; a part "
                    "of them may be missing: give the folder as it was saved, complete."
                ) from error
            raise
    warnings = []
    if stripped:
        tokens = dict.fromkeys(re.sub(r"\^|\\|\(\?:\)", "", pattern) for pattern in stripped)
        warnings.append(f"{name}: the names of its weights have {', '.join(tokens)} before or in them, which is left out.")
    other_parts = {key for key in info["unexpected_keys"] if OTHER_PARTS.match(key)}
    if other_parts:
        warnings.append(f"{name}: {first_names(other_parts)}: no part of {type(model).__name__}, left out.")
    if problems := loading_problems(info, info["unexpected_keys"] - other_parts):
        raise FolderError(
            f"{name} does not hold the {type(model).__name__} that its config.json describes: {'; '.join(problems)}; "
            f"{remedy(info)}"
        )
    return model, warnings


def loading_problems(info: dict[str, Any], unexpected: set[str]) -> list[str]:
    """The weights that are missing, of another shape, or unexpected, as phrases."""
    phrases = []
    if info["missing_keys"]:
        phrases.append(f"missing and to be drawn at random: {first_names(info['missing_keys'])}")
    if info["mismatched_keys"]:
        key, has, wants = min((k, tuple(has), tuple(wants)) for k, has, wants in info["mismatched_keys"])
        rest = len(info["mismatched_keys"]) - 1
        also = f", and {rest} more" if rest else ""
        phrases.append(f"of another shape: {key} is {list(has)} where {list(wants)} is meant{also}")
    if unexpected:
        phrases.append(f"without a place in the model: {first_names(unexpected)}")
    return phrases


def remedy(info: dict[str, Any]) -> str:
    """The remedy for a faulty loading report, as the end of a sentence."""
    if any("lora_" in key or "base_layer" in key for key in info["unexpected_keys"]):
        return "merge the adapter (PEFT's merge_and_unload) and save the result, or give the adapter's own folder."
    if info["missing_keys"] == {"lm_head.weight"}:
        return (
            "save the model with its output layer (AutoModelForCausalLM), or set tie_word_embeddings in config.json where "
            "that layer is the embedding."
        )
    return "give the folder as it was saved, complete and with the config.json that belongs to it."


def first_names(keys: set[str], n: int = 3) -> str:
    """The first n names, and the number of the rest, as text."""
    return ", ".join(sorted(keys)[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")


def wrappers(unexpected: set[str], expected: set[str], backbone: str) -> dict[str, str]:
    """The prefixes to strip from unexpected names, as patterns and replacements for transformers.

    Args:
        expected: names of the model's weights.
        backbone: the model's own prefix, which transformers adds where it is missing.
    """
    replacements: dict[str, str] = {}
    for key in sorted(unexpected):
        steps: dict[str, str] = {}
        rest = key
        while not expected & {rest, f"{backbone}.{rest}"}:
            if (step := next_step(rest)) is None:
                break
            pattern, replacement, rest = step
            while pattern in steps:
                pattern += "(?:)"  # each pattern strips a prefix once
            steps[pattern] = replacement
        else:
            replacements |= steps
    return replacements


def next_step(key: str) -> tuple[str, str, str] | None:
    """The first wrapper of a name: pattern, replacement, and the name without it."""
    for token in WRAPPERS:
        if token in key:
            return re.escape(token), "", key.replace(token, "", 1)
    for prefix in PREFIXES:
        if key.startswith(prefix):
            new = "model." if prefix == "model.language_model." else ""
            return f"^{re.escape(prefix)}", new, new + key.removeprefix(prefix)
    return None


def check_values(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Warnings on matrices of zeros, as an incomplete download may have.

    Raises:
        FolderError: a weight is not finite.
    """
    zeros, mask = set(), getattr(model.get_output_embeddings(), "bias", None)
    for key, value in model.named_parameters():
        if not value.is_floating_point() or not value.numel() or value.element_size() == 1:
            continue
        # A bias of -inf rules words out; losses take it so.
        values = value.detach().clamp_min(torch.finfo(value.dtype).min) if value is mask else value.detach()
        low, high = (bound.item() for bound in values.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise FolderError(
                f"{name}: {key} has values that are not finite; download it again, or give an earlier checkpoint."
            )
        if low == high == 0 and value.ndim > 1 and not key.endswith("bias") and not OTHER_PARTS.match(key):
            zeros.add(key)
    if zeros:
        yield f"{name}: {first_names(zeros)}: all zeros; where that is not meant, download it again."


@contextmanager
def reporting() -> Iterator[list[str]]:
    """A context that collects the loading reports of transformers, which would be printed."""
    reports: list[str] = []

    def quiet(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not any(words in text for words in ("LOAD REPORT", "seem corrupted", "will NOT tie")):
            return True
        reports.append(text)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(quiet)
    try:
        yield reports
    finally:
        logger.removeFilter(quiet)
