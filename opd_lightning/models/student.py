"""The student: backbone and head as one module whose forward pass returns its loss."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_lightning.contracts import TeacherScores
from opd_lightning.losses.head import Head, TokenLoss, head_loss
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models.backbone import backbone, scale, soft_cap, verify_head
from opd_lightning.models.cpu import fast_on_cpu
from opd_lightning.models.sharding import Sharding, align, unsharded
from opd_lightning.types import Sequences, Tokens
from opd_lightning.utils.vocabulary import ValidIds


class Student(nn.Module):
    """The trained model: backbone and head in one forward call, as DDP and FSDP need it.

    Args:
        lm: a causal language model of transformers.
        chunk: rows of logits that exist at a time; see `losses.head`.
        valid_ids: the ids that are tokens of its tokenizer; distributions are over these. None takes all rows.

    Attributes:
        sharding: the devices that its weights are spread over; None where each device has all of them.
    """

    sharding: Sharding | None = None

    def __init__(self, lm: PreTrainedModel, chunk: int = 256, valid_ids: ValidIds | None = None):
        super().__init__()
        self.lm, self.chunk, self.valid_ids = lm, chunk, valid_ids
        self.in_eval_mode = False

    @property
    def head(self) -> Head:
        """The output layer, which may share its weight with the embedding, with the model's scale and cap on logits."""
        layer, config = self.lm.get_output_embeddings(), self.lm.config.get_text_config()
        valid_ids, cap = self.valid_ids, soft_cap(config)
        return Head(layer.weight, getattr(layer, "bias", None), scale=scale(config), softcap=cap, valid_ids=valid_ids)

    @property
    def window(self) -> int:
        """The model's context length in tokens."""
        return int(getattr(self.lm.config.get_text_config(), "max_position_embeddings", 0) or sys.maxsize)

    def forward(
        self, sequences: Sequences, tokens: Tokens, scores: Mapping[str, TeacherScores], loss: TokenLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a micro-batch (a scalar) and statistics [N] of its completion tokens."""
        return head_loss(self.hidden(sequences), self.head, tokens, scores, loss, self.chunk)

    @contextmanager
    def eval_mode(self) -> Iterator[PreTrainedModel]:
        """A context with the language model in eval mode, unsharded and without gradients; the mode is restored."""
        if self.in_eval_mode:
            yield self.lm
            return
        was_training, self.in_eval_mode = self.training, True
        self.eval()
        try:
            with torch.no_grad(), unsharded(self):
                yield self.lm
                align(self, self.lm)
        finally:
            self.train(was_training)
            self.in_eval_mode = False

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context with its whole weights, and those of the teachers that are spread beside it; no device waits in it."""
        with self.eval_mode(), ExitStack() as stack:
            for gather in () if self.sharding is None else self.sharding.gathers:
                stack.enter_context(gather())
            yield

    def reading(self) -> AbstractContextManager[PreTrainedModel]:
        """A context for forward passes without gradients."""
        return self.eval_mode()

    def verify_head(self, name: str) -> None:
        """Check that backbone and head give the model's logits; see `backbone.verify_head`."""
        with self.reading() as lm:
            verify_head(lm, replace(self.head, valid_ids=None).project, name)

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states [N, H] at the positions that predict the trainable tokens; nothing else is projected."""
        # Rows are padded on the right, where a causal model does not look; sdpa would make of a mask rows x T x T numbers.
        plain = getattr(self.lm.config, "_attn_implementation", None) in ("sdpa", "eager")
        mask = None if plain else sequences.attention_mask
        out = backbone(self.lm)(input_ids=sequences.input_ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state[sequences.row, sequences.column]

    def read(self, batches: Sequence[Sequences], snapshot: bool = False) -> HiddenScores:
        """This model's next-token distributions on the completions of all batches, without gradient and in eval mode.

        Args:
            snapshot: copy the head's weights if they are trained, so that later updates do not change the scores. They are
                copied in any case where they are spread over devices, for the whole head is freed behind this.
        """
        with self.reading() as lm, fast_on_cpu(lm):
            copy = self.sharding is not None or (snapshot and self.head.weight.requires_grad)
            return self.scores([self.hidden(sequences) for sequences in batches], copy)

    def scores(self, hidden: Sequence[Tensor], copy: bool) -> HiddenScores:
        """The distributions of hidden states [n, H] of each batch; `copy` copies the head's weights."""
        rows, head = torch.cat(list(hidden)), self.head
        # The dtype is fixed here, for autocast is off where chunks are projected later.
        kept = replace(head.copy() if copy else head, dtype=head.compute_dtype(rows))
        return HiddenScores(rows, kept.project, head.known.size, absent=head.known.absent)
