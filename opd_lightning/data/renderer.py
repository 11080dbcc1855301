"""Rendering: token ids of a chat, through the model's own chat template."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd_lightning.types import Messages


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, **template_options) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins, through the model's own chat template.

    Raises:
        ValueError: the template refuses the chat, for example because it knows no system role.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **template_options
        )
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(
            f"the chat template of the model refuses a chat of {roles} ({error}); leave out what it does not know "
            "(task.system=null, or context.system=null with context.turns), or give model.chat_template=<file>."
        ) from error
    except Exception as error:  # a template is a program of the user's, and can fail in every way
        raise ValueError(
            f"the chat template of the model fails ({type(error).__name__}: {error}); give model.chat_template=<file>."
        ) from error
    return list(encoded["input_ids"])
