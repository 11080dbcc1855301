"""Pretrained models: weights, tokenizer and configuration of a folder, hub id, run or adapter."""

import json
import logging
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opd_lightning.config.aliases import read_run
from opd_lightning.config.names import absent, find, packaged
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.models import adapter_folder, adapters, hub, loading, shards, stand_in
from opd_lightning.models.architecture import UnsupportedModel, attention_errors, attention_for, class_of
from opd_lightning.models.files import FolderError, check_texts, check_tokenizer, has_tokenizer
from opd_lightning.models.student import Student
from opd_lightning.runs.identity import is_run

log = logging.getLogger(__name__)


def locate(path: str, field: str = "model.path") -> str:
    """The folder of `pkg://package/folder` (Hydra's syntax) or `stand-in://architecture`; other paths unchanged."""
    if path.startswith(stand_in.SCHEME):
        return stand_in.model_folder(path.removeprefix(stand_in.SCHEME), field)
    return packaged(path)


class Pretrained:
    """A causal language model and its tokenizer.

    Args:
        path: a folder, hub id, `pkg://package/folder`, run or adapter by PEFT; of `memory://` an `InMemory` is made.
        dtype: dtype of the loaded weights, such as "float32" or "bfloat16".
        attention: transformers' `attn_implementation`.
        template_options: keyword arguments for the chat template, such as {"enable_thinking": False}.
        teacher: path of a suitable external teacher; the default of `teacher=external`.
        chat_template: Jinja text, or a file with it, in place of the tokenizer's own; a base model has none.
        end_token: the token that ends replies, see `ChatRenderer`.
        split_special_tokens: tokenize special tokens that texts spell as text, see `ChatTemplate`.
        checkpointing: recompute activations in the backward pass of training, for memory.
        stand_in: whether the path is a random model, see `stand_in.py`.
        field: the configuration's field, for errors.
        base: the model that an adapter at `path` is merged into, in place of the one that its adapter_config.json names.
    """

    schemes: ClassVar[dict[str, type["Pretrained"]]] = {}

    def __init_subclass__(cls, scheme: str):
        cls.schemes[scheme] = cls

    def __new__(cls, path: str = "", *_: Any, **__: Any) -> "Pretrained":
        return super().__new__(next((sub for scheme, sub in cls.schemes.items() if str(path).startswith(scheme)), cls))

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        attention: str = "sdpa",
        template_options: dict | None = None,
        teacher: str | None = None,
        chat_template: str | None = None,
        checkpointing: bool = False,
        stand_in: bool = False,
        field: str = "model.path",
        end_token: str | None = None,
        split_special_tokens: bool = True,
        base: str | None = None,
    ):
        if not hasattr(torch, dtype) or not isinstance(getattr(torch, dtype), torch.dtype):
            raise ValueError(f"model.dtype={dtype!r} is no torch dtype; choose float32 or bfloat16.")
        if stand_in and not path.startswith("stand-in://"):
            raise ValueError(f"model.stand_in=true, but model.path={path} is a model of its own; leave one of them out.")
        self.stand_in = stand_in
        self.path, self.dtype, self.attention = path, getattr(torch, dtype), attention
        self.template_options, self.teacher = template_options or {}, teacher
        self.chat_template, self.checkpointing, self.field = chat_template, checkpointing, field
        self.end_token, self.split_special_tokens = end_token, split_special_tokens
        self.base = base

    def model(self) -> PreTrainedModel:
        """Load the weights, in eval mode."""
        if is_run(self.path):
            return self._from_run()
        if self.is_adapter():
            return self._with_checkpointing(adapter_folder.merge(self._base().model(), self._place(), self.name))
        with self._loading_errors():
            config = AutoConfig.from_pretrained(place := self._place(), trust_remote_code=False)
        attention = attention_for(config, self.attention, self.name)
        with self._loading_errors(), attention_errors(self.attention, self.field):
            model = loading.load(place, self.name, self.dtype, attention)
        # Weights that stay mapped to their file decode a third slower on a CPU than weights in memory of their own.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        if getattr(model.config, "rescale_every", 0):
            model.config.rescale_every = 0  # RWKV would divide its weights in place whenever it is in eval mode
        return self._with_checkpointing(model.eval())

    @property
    def name(self) -> str:
        """Field and value."""
        return f"{self.field}={self.path}"

    def preview(self) -> list[str]:
        """Check the weights by the files' headers; returns the warnings of loading, raises ValueError as loading would."""
        if self.is_adapter() and not is_run(self.path):
            adapter_folder.check(self._place(), self.name)
        if is_run(self.path) or self.is_adapter():
            return self._base().preview()
        with self._loading_errors():
            return loading.preview(self._place(), self.name)

    def is_adapter(self) -> bool:
        """Whether the path holds an adapter by PEFT."""
        with self._loading_errors():
            is_adapter = adapter_folder.is_adapter(self._located())
        if self.base is not None and not is_adapter and not is_run(self.path):
            option = self.field.replace("path", "base")
            raise ValueError(f"{option}={self.base}, but {self.name} is no adapter (adapter_config.json); set {option}=null.")
        return is_adapter

    def _place(self) -> str:
        """The folder or hub id, after a check of its configuration and tokenizer files."""
        if Path(place := self._located()).is_dir():
            check_texts(place, self.name)
        return place

    def _located(self) -> str:
        """The folder or hub id; raises FolderError for what can be neither, and for an id if no hub answers."""
        if problem := absent(place := locate(self.path, self.field)):
            raise FolderError(f"{self.name}{problem}")
        if not Path(place).is_dir():
            hub.check(place, self.name)
        return place

    def _with_checkpointing(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, with activation checkpointing if `checkpointing` is set."""
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with EOS as PAD if it has none; raises ValueError without EOS token or chat template."""
        if self._uses_base_tokenizer():
            return self._base().tokenizer()
        tokenizer = self._read_tokenizer()
        if self.chat_template is not None:
            tokenizer.chat_template = self._template(self.chat_template)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{self.field}={self.path}: its tokenizer has no EOS token, so completions would never end.")
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{self.field}={self.path}: its tokenizer has no chat template; use an instruction-tuned model, or "
                f"{self.field.partition('.')[0]}.chat_template=<file>."
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def renderer(self, today: datetime | None = None) -> ChatRenderer:
        """The tokenizer with its chat template; `today` is the date of templates that write one."""
        end = self.end_token or (self._base().end_token if is_run(self.path) or self.is_adapter() else None)
        return ChatRenderer(self.tokenizer(), self.template_options, end, self.split_special_tokens, today)

    @staticmethod
    def _template(template: str) -> str:
        """The Jinja text; a value without braces is a file's path."""
        if "{" in template:
            return template
        if not Path(template).is_file():
            raise ValueError(f"model.chat_template={template} does not exist; give a file, or the template itself.")
        return Path(template).read_text()

    def vocabulary(self) -> dict[str, int]:
        """The tokenizer's ids by token; needs neither EOS nor chat template."""
        return self._base().vocabulary() if self._uses_base_tokenizer() else self._read_tokenizer().get_vocab()

    def _uses_base_tokenizer(self) -> bool:
        """Whether the tokenizer is that of the base model."""
        return is_run(self.path) or (self.is_adapter() and not has_tokenizer(locate(self.path)))

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer at the path, unchanged."""
        config = self._base().config() if self.is_adapter() else None
        with self._loading_errors():
            if Path(place := self._place()).is_dir():
                check_tokenizer(place, self.name)
            return AutoTokenizer.from_pretrained(place, config=config, trust_remote_code=False)

    def generation_ends(self) -> list[int] | None:
        """The end ids of the model's generation config; None where it has none."""
        if is_run(self.path) or self.is_adapter():
            return self._base().generation_ends()
        try:
            ends = GenerationConfig.from_pretrained(locate(self.path)).eos_token_id
        except (OSError, ValueError):
            return None
        return ends if ends is None or isinstance(ends, list) else [int(ends)]

    def window(self) -> int:
        """The model's context length in tokens, prompt and completion together."""
        return int(getattr(self.config(), "max_position_embeddings", 0) or sys.maxsize)

    def vocab_size(self) -> int:
        """The size of the vocabulary, with padding."""
        return int(self.config().vocab_size)

    def config(self) -> PretrainedConfig:
        """The text model's configuration; no weights are loaded."""
        if is_run(self.path) or self.is_adapter():
            return self._base().config()
        with self._loading_errors():
            config = AutoConfig.from_pretrained(self._place(), trust_remote_code=False)
        class_of(config, self.name)
        return config.get_text_config()

    def lineage(self) -> list[str]:
        """Paths of the weights, newest first."""
        return [self.path, *(self._base().lineage() if is_run(self.path) or self.is_adapter() else [])]

    def training_flops(self) -> int | None:
        """The FLOPs of the training of these weights, from a run's ledger or made.json; None without either.

        Only the last training counts, not that of its start model or teacher.
        """
        folder = Path(locate(self.path))
        if is_run(self.path) and (folder / "ledger.json").is_file():
            return sum(json.loads((folder / "ledger.json").read_text())["flops"].values())
        made = json.loads((folder / "made.json").read_text()) if (folder / "made.json").is_file() else {}
        return made.get("train_flops")

    def start(self) -> "Pretrained":
        """The start model of the run at `path`; any other model is its own start."""
        return self._base() if is_run(self.path) else self

    def _base(self) -> "Pretrained":
        """The start model of the run, or the base model of the adapter, at `path`."""
        dtype, field, end = str(self.dtype).removeprefix("torch."), self.field, self.end_token
        if is_run(self.path):
            start = read_run(self.path)["model"]
            path, base, template = start["path"], start.get("base"), self.chat_template or start.get("chat_template")
            end = end or start.get("end_token")
        else:
            option = self.field.replace("path", "base")
            path = adapter_folder.base_of(locate(self.path), self.base, self.name, option)
            base, template, field = None, self.chat_template, f"{self.name}, an adapter: {option}"
        options, ends = (self.template_options, None, template, self.checkpointing), (end, self.split_special_tokens)
        return Pretrained(path, dtype, self.attention, *options, False, field, *ends, base)  # type: ignore[arg-type]

    def _from_run(self) -> PreTrainedModel:
        """The run's weights; an adapter is merged into its base model."""
        lm = self.adapted()
        return self._with_checkpointing(adapters.merged(lm)) if adapters.layers(lm) else lm

    def adapted(self) -> PreTrainedModel:
        """The weights of the run at `path`, with its adapter, if it has one, beside the others."""
        student = Student(self._base().model())
        adapter = read_run(self.path).get("adapter")
        if adapter is not None:
            options = {key: value for key, value in adapter.items() if key != "_target_"}
            adapters.add(student.lm, find(adapter["_target_"])(**options))
        saved = shards.weights(Path(self.path) / "checkpoints" / "last.ckpt")
        state = {k.removeprefix("student."): v for k, v in saved.items()}
        missing, unexpected = student.load_state_dict(state, strict=False)
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
        assert not unexpected and not trained & set(missing), "the checkpoint is of another model than its configuration"
        return student.lm

    def _loading_errors(self):
        return _LoadingErrors(f"{self.name} could not be loaded; give a folder, a hub id or the folder of a run")


class _LoadingErrors:
    """A context that turns errors of loading into one sentence that names the field."""

    def __init__(self, sentence: str):
        self.sentence = sentence

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        # Damaged files raise many kinds of errors; full memory is another fault, and the other two are sentences already.
        passed = isinstance(error, (FolderError, UnsupportedModel, MemoryError)) or "out of memory" in str(error)
        if passed or not isinstance(error, Exception):
            return
        text, missing = str(error).strip().splitlines() or [""], isinstance(error, ImportError)
        sentence = f"{self.sentence.partition(';')[0]}: a package is missing" if missing else self.sentence
        kind_of = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        raise ValueError(f"{sentence} ({kind_of}{' '.join(text) if missing else text[0]})") from error
