"""Weights policies: which weights the teacher has, and how they follow the student's.

A policy is a plain object that the module holds, not a submodule of it: its weights stay out of the optimizer, of DDP
and FSDP, and of the checkpoint.

    attach(student)            once, on the student's device, before a checkpoint is restored: load or copy
    read(student, sequences)   next-token distributions on the completions, as a `LogitSource`
    lend(student)              context manager: the weights as a language model in eval mode, to write with
    after_update(student)      after each optimizer step
    self_teacher               do the weights come from the student itself?
    fixed                      do they stay what they are? What a fixed teacher wrote can be used again.
    source                     the `Pretrained` they come from; None where that is the student's
"""

import copy
from contextlib import AbstractContextManager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.models import Pretrained, Student
from opd_lightning.types import LogitSource, Sequences


class _Fixed:
    """A model of its own that never moves."""

    fixed = True
    model: Student

    def read(self, student: Student, sequences: Sequences) -> LogitSource:
        """This model's distributions."""
        return self.model.read(sequences)

    def lend(self, student: Student) -> AbstractContextManager[PreTrainedModel]:
        """This model."""
        return self.model.evaluating()

    def after_update(self, student: Student) -> None:
        """Nothing moves."""


class FrozenStart(_Fixed):
    """A copy of the student as it was when training began."""

    self_teacher = True
    source = None

    def attach(self, student: Student) -> None:
        """Copy the student; a resumed run attaches before its checkpoint is read, so this is the start in any case."""
        self.model = copy.deepcopy(student).requires_grad_(False).eval()


class External(_Fixed):
    """Another model with the same tokenizer.

    Args:
        path, dtype, attention: as for `Pretrained`.
        tokenizer: the student's, to compare with before anything is loaded.

    Raises:
        ValueError: the tokenizers differ.
    """

    self_teacher = False

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", attention: str = "sdpa"):
        self.source = Pretrained(path, dtype, attention, field="teacher.path")
        if self.source.vocabulary() != tokenizer.get_vocab():
            raise ValueError(
                f"teacher.path={path} has another tokenizer than the student, so token ids would mean different texts; choose "
                "a teacher of the student's family."
            )

    def attach(self, student: Student) -> None:
        """Load the weights next to the student's.

        Raises:
            ValueError: a word of the tokenizer lies outside of one of the vocabularies. Vocabularies may be padded differently.
        """
        name = f"teacher.path={self.source.path}"
        self.model = Student(self.source.model(), student.chunk).requires_grad_(False).eval().to(student.lm.device)
        self.model.verify_head(name)
        shared, words = min(self.model.head.weight.shape[0], student.head.weight.shape[0]), len(self.source.vocabulary())
        if shared < words:
            raise ValueError(
                f"{name} and the student share {shared} ids, and their tokenizer has {words}: not all words can be compared; "
                "choose models of one family."
            )


class Live:
    """The student itself, at its current weights. An ablation: such a teacher drifts with its student and may collapse."""

    self_teacher = True
    fixed = False
    source = None

    def attach(self, student: Student) -> None:
        """Nothing to load."""

    def read(self, student: Student, sequences: Sequences) -> LogitSource:
        """The student's own distributions as they are now, whatever updates follow on the same rollout."""
        return student.read(sequences, snapshot=True)

    def lend(self, student: Student) -> AbstractContextManager[PreTrainedModel]:
        """The student."""
        return student.evaluating()

    def after_update(self, student: Student) -> None:
        """The weights are the student's."""
