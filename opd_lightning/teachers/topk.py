"""The top-k view of a local teacher: the log-probabilities that a server would return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.losses.targets import TopKLogProbs
from opd_lightning.teachers.base import Composite
from opd_lightning.teachers.reduced import reduced, written_ids
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of


@dataclass(frozen=True)
class TopKView:
    """Scores of another teacher, cut to the k most probable tokens and the sampled one, chunk by chunk.

    Attributes:
        inner: the other teacher's scores, of the full vocabulary.
        ids [N]: the sampled tokens.
        k: number of most probable tokens.
    """

    inner: Any
    ids: Tensor
    k: int

    @property
    def vocabulary(self) -> int:
        """The other teacher's size of the vocabulary."""
        return self.inner.vocabulary

    @property
    def absent(self) -> tuple[int, ...]:
        """The other teacher's absent ids."""
        return valid_ids_of(self.inner).absent

    @property
    def valid(self) -> Tensor | None:
        """The other teacher's valid tokens."""
        return self.inner.valid

    @property
    def cost(self) -> Cost:
        """The other teacher's cost."""
        return self.inner.cost

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """The other teacher's metrics."""
        return self.inner.metrics

    def take(self, index: Tensor | slice) -> "TopKView":
        """The rows at an index of the packed axis."""
        return TopKView(self.inner.take(index), self.ids[index], self.k)

    def chunk(self, rows: slice, out: Tensor | None = None) -> TopKLogProbs:
        """The k most probable tokens of the rows."""
        sampled = self.ids[rows]
        covered = valid_ids_of(self).contains(sampled)  # tokens that the teacher lacks are not valid
        return reduced(self.inner.chunk(rows, out), "topk", torch.where(covered, sampled, 0), self.k)


class TopKTeacher(Composite):
    """A teacher that provides only the k most probable tokens and the sampled one of another.

    Of a teacher with another tokenizer these are tokens of its own, as a server's, of which the shared ones are compared.

    Args:
        teacher: a teacher that provides the full vocabulary.
        k: number of tokens.

    Raises:
        ValueError: k is less than 1, or the teacher does not provide the full vocabulary.
    """

    def __init__(self, teacher: Any, k: int):
        super().__init__({"teacher": teacher})
        if k < 1:
            raise ValueError(f"teacher.k={k} must be at least 1.")
        if "full" not in teacher.provides:
            raise ValueError("teacher.teacher gives no whole vocabulary to take the top k of; use it as it is.")
        if unnamed := next((part for part in self.parts if not getattr(part.alignment, "names_tokens", True)), None):
            raise ValueError(
                f"teacher.teacher with {type(unnamed.alignment).__name__} compares sorted probabilities, which are of no "
                "tokens to take the top k of; choose teacher.alignment=shared."
            )
        if len(self.parts) == 1 and not self.apart:  # as a served one, it may be aligned as a whole
            self.own_tokenizer, self.alignment, self.source = teacher.own_tokenizer, teacher.alignment, teacher.source
            self.context, self.reads_context, self.shares_weights = (
                teacher.context,
                teacher.reads_context,
                teacher.shares_weights,
            )
        # Of teachers with other tokenizers inside, the written token may be several.
        self.inner, self.top_k, self.provides = teacher, k, teacher.provides & {"topk", "sampled"}

    def remade(self, teachers: dict[str, Any]) -> "TopKTeacher":
        """The same of another teacher."""
        return TopKTeacher(teachers["teacher"], self.top_k or 1)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the tokenizer for the other teacher, and k; raises ValueError if there are fewer tokens."""
        super().check_tokenizer(tokenizer)
        ids = ValidIds.of(tokenizer.get_vocab())
        count = (ids if self.valid_ids is None else ids.intersection([self.valid_ids])).count
        if (self.top_k or 1) > count and not self.apart:
            raise ValueError(f"teacher.k={self.top_k} exceeds the {count} tokens that student and teacher share; lower it.")

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> TopKView:
        """The top-k view of the other teacher's scores."""
        scores = self.inner.score(samples, max_tokens)
        return TopKView(scores, written_ids(samples, self.student.lm.device), self.top_k or 1)
