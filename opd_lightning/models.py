"""Models: where weights come from, and the student as one module whose forward pass returns its loss."""

import importlib.resources
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.losses.head import Head, TokenLoss, head_loss
from opd_lightning.types import LogitSource, Sequences, Tokens

log = logging.getLogger(__name__)


def locate(path: str) -> str:
    """A folder for `pkg://package/folder` (as Hydra writes it), else the path unchanged."""
    if path.startswith("pkg://"):
        package, _, inside = path.removeprefix("pkg://").partition("/")
        return str(importlib.resources.files(package).joinpath(inside))
    return path


def is_run(path: str) -> bool:
    """Is this the folder of a run whose weights are in its checkpoint?"""
    return (Path(path) / "checkpoints" / "last.ckpt").is_file() and (Path(path) / "config.yaml").is_file()


class Pretrained:
    """A causal language model and its tokenizer.

    Args:
        path: a folder, a hub id, `pkg://package/folder`, or the folder of a finished run.
        dtype: of the loaded weights, such as "float32" or "bfloat16".
        attention: transformers' `attn_implementation`.
        template_options: keyword arguments for the chat template, such as {"enable_thinking": False}.
        teacher: path of a model that makes a good external teacher; the default of `teacher=external`.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        attention: str = "sdpa",
        template_options: dict | None = None,
        teacher: str | None = None,
    ):
        if not hasattr(torch, dtype) or not isinstance(getattr(torch, dtype), torch.dtype):
            raise ValueError(f"model.dtype={dtype!r} is no torch dtype; choose float32 or bfloat16.")
        self.path, self.dtype, self.attention = path, getattr(torch, dtype), attention
        self.template_options, self.teacher = template_options or {}, teacher

    def model(self) -> PreTrainedModel:
        """Load the weights, in eval mode."""
        if is_run(self.path):
            return self._from_run()
        with self._explained():
            model = AutoModelForCausalLM.from_pretrained(
                locate(self.path), dtype=self.dtype, attn_implementation=self.attention, trust_remote_code=False
            )
        # Weights that stay mapped to their file decode a third slower on a CPU than weights in memory of their own.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; it must have an EOS token and a chat template, and borrows EOS as PAD if it has none."""
        if is_run(self.path):
            return self._base().tokenizer()
        with self._explained():
            tokenizer = AutoTokenizer.from_pretrained(locate(self.path), trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model.path={self.path}: its tokenizer has no EOS token, so completions would never end.")
        if tokenizer.chat_template is None:
            raise ValueError(f"model.path={self.path}: its tokenizer has no chat template; use an instruction-tuned model.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def lineage(self) -> list[str]:
        """Where the weights come from, newest first."""
        return [self.path, *(self._base().lineage() if is_run(self.path) else [])]

    def start(self) -> "Pretrained":
        """What the run at `path` started from; any other model is its own start."""
        return self._base() if is_run(self.path) else self

    def _base(self) -> "Pretrained":
        """What the run at `path` started from."""
        start = yaml.safe_load((Path(self.path) / "config.yaml").read_text())["model"]["path"]
        return Pretrained(start, str(self.dtype).removeprefix("torch."), self.attention, self.template_options)

    def _from_run(self) -> PreTrainedModel:
        student = Student(self._base().model())
        checkpoint = torch.load(Path(self.path) / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        student.load_state_dict({k.removeprefix("student."): v for k, v in checkpoint["state_dict"].items()})
        return student.lm

    def _explained(self):
        return _Explained(f"model.path={self.path} could not be loaded; give a folder, a hub id or the folder of a run")


class _Explained:
    """Turns what loading raises into one sentence that names the field."""

    def __init__(self, sentence: str):
        self.sentence = sentence

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (OSError, ValueError, json.JSONDecodeError)):
            raise ValueError(f"{self.sentence} ({str(error).strip().splitlines()[0]})") from error


class Student(nn.Module):
    """The trained model: backbone and head in one forward call, so that DDP and FSDP see the whole of it.

    Args:
        lm: a causal language model of transformers.
        chunk: rows of logits that exist at a time; see `losses.head`.
    """

    def __init__(self, lm: PreTrainedModel, chunk: int = 128):
        super().__init__()
        self.lm, self.chunk = lm, chunk

    @property
    def head(self) -> Head:
        """The output layer, which may share its weight with the embedding."""
        layer = self.lm.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None))

    def forward(
        self, sequences: Sequences, tokens: Tokens, sources: Mapping[str, LogitSource], loss: TokenLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a micro-batch (a scalar) and statistics [N] of its completion tokens."""
        return head_loss(self.hidden(sequences), self.head, tokens, sources, loss, self.chunk)

    @torch.no_grad()
    def verify_head(self, name: str) -> None:
        """Make sure that backbone and head together are the model; some models scale or cap their logits in between.

        Raises:
            ValueError: they are not; `name` is the field to blame.
        """
        was_training = self.training
        self.eval()
        ids = torch.arange(4, device=self.lm.device)[None]
        expected = self.lm(input_ids=ids).logits.float()
        found = self.head.project(self.lm.base_model(input_ids=ids).last_hidden_state[0]).float()
        self.train(was_training)
        if (found - expected[0]).abs().max() > 0.05 * expected.abs().max().clamp_min(1.0):
            raise ValueError(
                f"{name}: {type(self.lm).__name__} changes its logits behind the output layer (scaling or soft-capping), "
                "which losses do not reproduce yet; choose another model."
            )

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states [N, H] at the positions that predict the completion tokens; prompts are never projected."""
        backbone = self.lm.base_model
        out = backbone(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False)
        return out.last_hidden_state[sequences.row, sequences.column]

    @torch.no_grad()
    def read(self, sequences: Sequences, snapshot: bool = False) -> LogitSource:
        """This model's next-token distributions on the completions, without gradient and in eval mode.

        Args:
            snapshot: copy the head's weights, so that the source stays what it is when the model is updated.
        """
        was_training = self.training
        self.eval()
        hidden = self.hidden(sequences)
        # The dtype is settled here: where a chunk is projected later, autocast is off.
        head = replace(self.head, dtype=self.head.compute_dtype(hidden))
        source = LogitSource(hidden, (head.copy() if snapshot else head).project)
        self.train(was_training)
        return source
