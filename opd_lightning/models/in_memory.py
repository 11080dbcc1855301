"""Models in memory: transformers objects in the place of files."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.models.adapters import layers
from opd_lightning.models.architecture import class_of
from opd_lightning.models.pretrained import Pretrained
from opd_lightning.utils.in_memory import SCHEME, holder


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer, in memory.

    Attributes:
        model: is never changed; see `InMemory.model`.
        tokenizer: None takes the one at the model's `name_or_path`.
        frozen: whether its weights are only read, as a teacher's.
        argument: the name of the argument that gave the model, for errors.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    frozen: bool
    argument: str

    def __post_init__(self) -> None:
        kind = type(self.model).__name__
        if not isinstance(self.model, PreTrainedModel):
            remedy = (
                "its base model before PEFT wrapped it, with adapter=<LoraConfig>" if is_peft(self.model) else "one of them"
            )
            raise ValueError(f"{self.argument}={kind} is no model of transformers; give {remedy}, or a path.")
        if layers(self.model):
            raise ValueError(
                f"{self.argument}={kind} has an adapter already; merge it (PEFT's merge_and_unload), or give its base and "
                "adapter=<LoraConfig>."
            )
        class_of(self.model.config, f"{self.argument}={kind}")
        if self.model.get_output_embeddings() is None:
            raise ValueError(f"{self.argument}={kind} has no output layer; load it with AutoModelForCausalLM.")


def is_peft(model: Any) -> bool:
    """Whether an object is a model wrapped by PEFT."""
    return hasattr(model, "get_base_model")


def tokenizer_of(given: Any, option: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that an argument gives: one of transformers, a path as for models, or None.

    Raises:
        ValueError: it is something else, or there is none at the path.
    """
    if isinstance(given, str | Path):
        source = Pretrained(str(given), field=option)
        return source.tokenizer() if source._uses_base_tokenizer() else source._read_tokenizer()
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    remedy = "its .tokenizer" if isinstance(getattr(given, "tokenizer", None), PreTrainedTokenizerBase) else "one of them"
    raise ValueError(f"{option}={type(given).__name__} is no tokenizer of transformers; give {remedy}, or a path.")


class InMemory(Pretrained, scheme=SCHEME):
    """A `Pretrained` whose path names a `LanguageModel` in memory; its other options are those of `Pretrained`."""

    def __init__(self, path: str, *args: Any, **options: Any):
        super().__init__(path, *args, **options)
        self.holder = holder(path)
        self.given: LanguageModel = self.holder.value

    def model(self) -> PreTrainedModel:
        """A copy of the model in eval mode; a frozen one shares its weights with the original."""
        memo: dict[int, Any] = {}
        if self.given.frozen:
            memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.given.model.parameters()}
            memo |= {id(buffer): buffer for buffer in self.given.model.buffers()}
        return self._with_checkpointing(copy.deepcopy(self.given.model, memo).eval())

    def preview(self) -> list[str]:
        """No warnings: there are no files."""
        return []

    def is_adapter(self) -> bool:
        """False; see `LanguageModel`."""
        return False

    def config(self) -> PretrainedConfig:
        """The text model's configuration."""
        return self.given.model.config.get_text_config()

    def generation_ends(self) -> list[int] | None:
        """The end ids of the model's generation config; None where it has none."""
        ends: Any = getattr(self.given.model.generation_config, "eos_token_id", None)
        return ends if ends is None or isinstance(ends, list) else [int(ends)]

    def lineage(self) -> list[str]:
        """Where the model was loaded from, if that is known."""
        return [str(self.given.model.config.name_or_path or self.path)]

    def training_flops(self) -> int | None:
        """None: not known."""
        return None

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        return copy.deepcopy(self._original)

    @cached_property
    def _original(self) -> PreTrainedTokenizerBase:
        """The given tokenizer, or the one beside the model's files."""
        if self.given.tokenizer is not None:
            return self.given.tokenizer
        place = str(self.given.model.config.name_or_path or "")
        option = "tokenizer" if self.given.argument == "student" else f"{self.given.argument}_tokenizer"
        try:
            if not place:
                raise ValueError("the model has no name_or_path to find one at")
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # many kinds, from missing files to damaged ones
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{option} is missing ({first}); give the tokenizer of {self.given.argument}.") from error
