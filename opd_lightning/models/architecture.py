"""What transformers can do with an architecture, known from its configuration before weights are loaded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


class Refused(ValueError):
    """A sentence that names its field already."""


def class_of(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class of causal language models for a configuration.

    Args:
        name: field and path, to name in errors.

    Raises:
        Refused: there is none.
    """
    found: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)  # type: ignore[attr-defined]
    if found is None:
        raise Refused(
            f"{name} is of the architecture {config.model_type}, for which transformers has no causal language model: it reads "
            "images or sound, or predicts no next token; choose a language model, such as its text-only sibling."
        )
    return found[0] if isinstance(found, tuple) else found


def attention_for(config: PretrainedConfig, asked: str, name: str) -> str:
    """The attention to load a model with: as asked, but eager where the architecture does not have sdpa."""
    kind = class_of(config, name)
    if asked != "sdpa" or kind._supports_sdpa:
        return asked
    log.warning(f"warning: {name}: {kind.__name__} has no sdpa attention; attention=eager is used instead.")
    return "eager"


@contextmanager
def attention_explained(asked: str, field: str) -> Iterator[None]:
    """Turns what transformers says of an attention that is unknown or not installed into one sentence.

    Args:
        asked: the attention.
        field: of the model's path, beside which `attention` stands.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if not any(word in str(error).lower() for word in ("attention implementation", "attn_implementation", "flash")):
            raise
        first = str(error).strip().splitlines()[0]
        place = f"{field.removesuffix('.path')}.attention={asked}"
        raise Refused(f"{place} cannot be used ({first}); choose sdpa or eager.") from error
