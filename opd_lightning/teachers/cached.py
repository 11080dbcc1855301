"""A teacher whose scores were written to files before training, by python -m opd_lightning.score."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Renderer
from opd_lightning.data.score_files import ScoreFiles, fingerprint_of_vocabulary, fingerprint_of_weights
from opd_lightning.losses.aligned_targets import CoarseTopK
from opd_lightning.losses.outcomes import Outcomes
from opd_lightning.losses.targets import HiddenScores, TopKLogProbs, TopKScores
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.output_layers import without_blocks
from opd_lightning.teachers.base import BaseTeacher
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.vocabulary import ValidIds


class CachedTeacher(BaseTeacher):
    """Scores from files. It knows the samples in them and no others: rollout=dataset, or rollout=recorded.

    Args:
        path: the folder; the context that the teacher read is in the scores.
        context: none.

    Raises:
        ValueError: the folder holds no complete scores, or scores of an earlier version that could be misread.
    """

    scores_any_text = False

    def __init__(self, path: str | None = None, context: NoContext | None = None):
        super().__init__(context)
        if path is None:
            raise ValueError("teacher.path=null: give the folder that python -m opd_lightning.score has written.")
        self.files = ScoreFiles(path)
        self.path, self.index = path, self.files.index
        self.top_k = self.index.k or None
        self.provides = frozenset({"topk", "sampled"} if self.index.kind == "topk" else {"full", "topk", "sampled"})
        self.tables = self.files.tables()
        self.apart = bool(self.tables)
        self.check_outcomes()
        if self.apart:  # the written token may be one of several of its outcome
            self.provides = frozenset({"topk"})

    def check_outcomes(self) -> None:
        """Raises ValueError for scores that may be of outcomes, and do not say which."""
        if self.index.kind != "topk" or self.apart or self.index.compared == "tokens":
            return
        if self.index.compared == "outcomes" or self.files.has("valid"):
            raise ValueError(
                f"teacher.path={self.path} has top-k scores for some places only and no table of outcomes, as an earlier "
                "version wrote for a teacher with another tokenizer; they would be read as its scores of the student's tokens. "
                "Score it again with python -m opd_lightning.score."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if the scores are of another tokenizer's tokens."""
        if fingerprint_of_vocabulary(tokenizer.get_vocab()) != self.index.tokenizer:
            raise ValueError(
                f"teacher.path={self.path} was scored for a student with another tokenizer; score it again for this one."
            )

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Read the output layer that hidden states need.

        Raises:
            ValueError: it is another than that of the scored hidden states.
        """
        super().setup(student, renderer)
        self.fingerprint = Fingerprint(f"teacher.path={self.path}", self.files.first_numbers(), 0.0)
        if self.apart:
            every = torch.arange(self.index.vocabulary, device=student.lm.device)
            self.outcomes = Outcomes.kept(self.tables, ValidIds(len(every), tuple(self.index.absent)).contains(every))
        if self.index.output_layer is None:
            return
        layer = self.index.output_layer
        source = Pretrained(layer["path"], layer["dtype"], field="teacher.path: output layer")
        ids = ValidIds(self.index.vocabulary, tuple(self.index.absent))
        self.output = Student(without_blocks(source).to(student.lm.device), student.chunk, ids)
        if fingerprint_of_weights(self.output.head.weight, self.output.head.bias) != layer["fingerprint"]:
            raise ValueError(
                f"teacher.path={self.path} has hidden states of another model than {layer['path']} is now; score it again."
            )

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> TopKScores | HiddenScores:
        """The scores of these samples.

        Raises:
            ValueError: one was not scored.
        """
        places = []
        for sample, place in zip(samples, self.files.find(samples), strict=True):
            if place is None or place.trainable.stop - place.trainable.start != sample.trainable:
                why = self.files.why_other(sample.example, sample.token_ids[: sample.prompt_length].tolist())
                raise ValueError(
                    f"teacher.path={self.path} has no scores of a completion of example {sample.example.id}: {why}. Take "
                    f"rollout=recorded rollout.path={self.path}, bring back what has changed, or score again."
                )
            places.append(place)

        def packed(name: str) -> Tensor | None:
            parts = [self.files.rows(name, place) for place in places]
            known = [part for part in parts if part is not None]
            return torch.cat(known).to(self.student.lm.device) if len(known) == len(parts) else None

        valid, cost, size = packed("valid"), Cost(), self.index.vocabulary
        if self.index.kind == "topk":
            ids, logprobs, sampled = packed("top_ids"), packed("top_logprobs"), packed("sampled")
            assert ids is not None and logprobs is not None
            if self.apart:
                outcomes = self.outcomes
                return TopKScores(CoarseTopK(outcomes.student.outcome[ids.long()], logprobs, outcomes, valid), size, cost)
            assert sampled is not None
            return TopKScores(TopKLogProbs(ids.long(), logprobs, sampled, valid), size, cost)
        hidden, head = packed("hidden"), self.output.head
        assert hidden is not None
        hidden = hidden.to(head.weight.dtype)
        return HiddenScores(hidden, head.project, size, valid, cost, absent=tuple(self.index.absent))

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the output layer; 0 for top-k scores."""
        return 0 if self.index.output_layer is None else 2 * positions * self.output.head.weight.numel()
