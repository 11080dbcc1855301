"""Weights policies: which weights the teacher has, and how they follow the student's.

A policy is a plain object that the module holds, not a submodule of it: its weights stay out of the optimizer, of DDP
and FSDP, and of the checkpoint.

    attach(student, tokenizer) once, on the student's device, before a checkpoint is restored: load or copy
    read(student, sequences)   next-token distributions on the completions, as a `LogitSource`
    after_update(student)      after each optimizer step
    self_teacher               do the weights come from the student itself?
"""

import copy

from transformers import PreTrainedTokenizerBase

from opd_lightning.models import Pretrained, Student
from opd_lightning.types import LogitSource, Sequences


class FrozenStart:
    """A copy of the student as it was when training began."""

    self_teacher = True

    def attach(self, student: Student, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copy the student; a resumed run attaches before its checkpoint is read, so this is the start in any case."""
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    def read(self, student: Student, sequences: Sequences) -> LogitSource:
        """The start model's distributions."""
        return self.model.read(sequences)

    def after_update(self, student: Student) -> None:
        """Nothing moves."""


class External:
    """Another model with the same tokenizer.

    Args:
        path, dtype, attention: as for `Pretrained`.
    """

    self_teacher = False

    def __init__(self, path: str, dtype: str = "float32", attention: str = "sdpa"):
        self.source = Pretrained(path, dtype, attention)

    def attach(self, student: Student, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the weights next to the student's.

        Raises:
            ValueError: the tokenizers or the vocabularies differ.
        """
        name = f"teacher.path={self.source.path}"
        if self.source.tokenizer().get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{name} has another tokenizer than the student; token ids would mean different texts.")
        self.model = Student(self.source.model(), student.chunk).requires_grad_(False).eval().to(student.lm.device)
        self.model.verify_head(name)
        theirs, ours = self.model.head.weight.shape[0], student.head.weight.shape[0]
        if theirs != ours:
            raise ValueError(f"{name} predicts {theirs} tokens, the student {ours}; choose models of one family and size.")

    def read(self, student: Student, sequences: Sequences) -> LogitSource:
        """The external model's distributions."""
        return self.model.read(sequences)

    def after_update(self, student: Student) -> None:
        """Nothing moves."""


class Live:
    """The student itself, at its current weights. An ablation: such a teacher drifts with its student and may collapse."""

    self_teacher = True

    def attach(self, student: Student, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing to load."""

    def read(self, student: Student, sequences: Sequences) -> LogitSource:
        """The student's own distributions as they are now, whatever updates follow on the same rollout."""
        return student.read(sequences, snapshot=True)

    def after_update(self, student: Student) -> None:
        """The weights are the student's."""
