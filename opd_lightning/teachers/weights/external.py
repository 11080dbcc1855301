"""Another model with the same tokenizer."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.flops import Sizes
from opd_lightning.teachers.weights.base import Weights
from opd_lightning.types import Sequences


class External(Weights):
    """Another model with the same tokenizer.

    Args:
        path, dtype, attention, base: as for `Pretrained`.
        field: of the configuration, to name in errors.
    """

    self_teacher = False
    frozen = True
    source: Pretrained

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        attention: str = "sdpa",
        field: str = "teacher.path",
        base: str | None = None,
    ):
        self.source, self.field = Pretrained(path, dtype, attention, field=field, base=base), field

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before anything is loaded; raises ValueError if the tokenizer is another one than the student's."""
        if self.source.vocabulary() != tokenizer.get_vocab():
            raise ValueError(
                f"{self.field}={self.source.path} has another tokenizer than the student, so token ids would mean different "
                "texts; choose a teacher of the student's family."
            )

    def setup(self, student: Student) -> None:
        """Load the weights next to the student's.

        Raises:
            ValueError: a word of the tokenizer lies outside of one of the vocabularies. Vocabularies may be padded differently.
        """
        super().setup(student)
        name = f"{self.field}={self.source.path}"
        self.model = Student(self.source.model(), student.chunk).requires_grad_(False).eval().to(student.lm.device)
        self.model.verify_head(name)
        shared, words = min(self.model.head.weight.shape[0], student.head.weight.shape[0]), len(self.source.vocabulary())
        if shared < words:
            raise ValueError(
                f"{name} and the student share {shared} ids, and their tokenizer has {words}: not all words can be compared; "
                "choose models of one family."
            )

    def sizes(self) -> Sizes:
        """The other model's."""
        return Sizes.of(self.model.lm)

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """The other model's distributions."""
        return self.model.read(batches)

    def language_model(self) -> AbstractContextManager[PreTrainedModel]:
        """The other model."""
        return self.model.evaluating()
