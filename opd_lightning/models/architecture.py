"""Support of an architecture by transformers, from its configuration alone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


class UnsupportedModel(ValueError):
    """A model or its attention is not supported; the message names the field."""


def class_of(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class of causal language models for a configuration.

    Args:
        name: the field and its path, for errors.

    Raises:
        UnsupportedModel: there is none.
    """
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)  # type: ignore[attr-defined]
    if model_class is None:
        raise UnsupportedModel(
            f"{name} is of the architecture {config.model_type}, for which transformers has no causal language model: it reads "
            "images or sound, or predicts no next token; choose a language model, such as its text-only sibling."
        )
    return model_class[0] if isinstance(model_class, tuple) else model_class


def attention_for(config: PretrainedConfig, requested: str, name: str) -> str:
    """The attention to load a model with: the requested one, or eager where the architecture has no sdpa."""
    model_class = class_of(config, name)
    if requested != "sdpa" or model_class._supports_sdpa:
        return requested
    log.warning(f"warning: {name}: {model_class.__name__} has no sdpa attention; attention=eager is used instead.")
    return "eager"


@contextmanager
def attention_errors(requested: str, field: str) -> Iterator[None]:
    """A context that turns errors on an unknown or missing attention into one sentence.

    Args:
        requested: the attention.
        field: the field of the model's path.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if not any(word in str(error).lower() for word in ("attention implementation", "attn_implementation", "flash")):
            raise
        first = str(error).strip().splitlines()[0]
        place = f"{field.removesuffix('.path')}.attention={requested}"
        raise UnsupportedModel(f"{place} cannot be used ({first}); choose sdpa or eager.") from error
