"""Rendering: token ids of a chat, through the model's own chat template, and of the replies in it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd_lightning.types import Messages, Rendered
from opd_lightning.utils.vocabulary import Words


class ChatRenderer:
    """A tokenizer with its chat template.

    Args:
        tokenizer: the model's.
        template_options: keyword arguments for the chat template, such as {"enable_thinking": False}.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_options: dict | None = None):
        self.tokenizer, self.template_options = tokenizer, template_options or {}

    @cached_property
    def words(self) -> Words:
        """The ids that are words of the tokenizer."""
        return Words.of(self.tokenizer.get_vocab())

    def with_options(self, template_options: dict | None) -> "ChatRenderer":
        """The same tokenizer with other options for its template."""
        return ChatRenderer(self.tokenizer, template_options)

    def render(self, messages: Messages, tools: Sequence[Any] | None = None) -> Rendered:
        """A chat up to where the assistant's reply begins; raises ValueError if the template refuses it."""
        options = self.template_options | ({"tools": list(tools)} if tools else {})
        return Rendered(encode_chat(self.tokenizer, messages, **options))

    def reply(self, text: str) -> list[int]:
        """Token ids of an assistant's reply with its end token."""
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def between(self, messages: Messages, reply: str, answers: Messages) -> list[int]:
        """Token ids that stand between the reply's end token and where the next reply begins.

        Args:
            messages: the chat before the reply.
            reply: its text.
            answers: the messages behind it.

        Raises:
            ValueError: the template writes the chat before the answers otherwise when they follow, so that what the student
                wrote would not be what it reads.
        """
        said = [*messages, {"role": "assistant", "content": reply}]
        before, begin = self.closed(said), len(self.render(messages).token_ids)
        after = self.render([*said, *answers]).token_ids
        ends = [i for i, token in enumerate(before) if token == self.tokenizer.eos_token_id and i >= begin]
        cut = ends[-1] + 1 if ends else len(before)
        if after[:cut] != before[:cut]:
            raise ValueError(
                "the chat template of the model rewrites earlier turns when others follow, so a conversation cannot go on from "
                "the tokens that were written; use another model, or environment=single_turn."
            )
        return after[cut:]

    def closed(self, messages: Messages) -> list[int]:
        """Token ids of a chat that ends with the assistant's reply."""
        encoded: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, tokenize=True, return_dict=True, **self.template_options
        )
        return list(encoded["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)


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
