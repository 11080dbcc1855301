"""The weights of another model of the same family, whose ids mean the same tokens."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.contracts import Renderer
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Frozen, Pretrained, Student
from opd_lightning.models.ends import exchange_rows, usual_ends
from opd_lightning.models.flops import Sizes
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.teachers.weights.base import Weights
from opd_lightning.types import Sequences
from opd_lightning.utils.vocabulary import Overlap, ValidIds, differences, overlap


class AnotherTokenizer(ValueError):
    """The error of a teacher whose ids mean other texts than the student's."""


class External(Weights):
    """The weights of another model. Its ids mean the same tokens as the student's, unless an `AlignedTeacher` reads it.

    Args:
        path, dtype, attention, base, chat_template: as for `Pretrained`; the template is read by an `AlignedTeacher` alone.
        field: the configuration's field, for errors.
        offload: whether the weights are on the host between scorings.
    """

    self_teacher = False
    frozen = True
    source: Pretrained
    overlap: Overlap | None = None
    exchanged: tuple[int, int] | None = None

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        attention: str = "sdpa",
        field: str = "teacher.path",
        base: str | None = None,
        chat_template: str | None = None,
        offload: bool = False,
    ):
        self.source = Pretrained(path, dtype, attention, chat_template=chat_template, field=field, base=base)
        self.field, self.offload = field, offload

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find, before anything is loaded, the ids that both tokenizers have.

        A token that only the teacher has is dropped from its distribution, which is renormalised. For tokens that only the
        student has there is no target, see `losses.shared`.

        Raises:
            AnotherTokenizer: an id means different tokens, or the two have little in common.
        """
        name, comparison = f"{self.field}={self.source.path}", overlap(tokenizer.get_vocab(), self.source.vocabulary())
        if comparison.conflicts or comparison.shared.count * 2 < max(comparison.shared.count + len(comparison.student_only), 1):
            reason = differences(comparison) if comparison.conflicts else f"only {comparison.shared.count} ids are in both"
            raise AnotherTokenizer(
                f"{name} has another tokenizer than the student ({reason}), so token ids would mean different texts; choose a "
                "teacher of the student's family, or teacher=external or remote with teacher.alignment=shared, spans or uld."
            )
        self.overlap = comparison
        self.valid_ids = comparison.shared if comparison.student_only else None

    def take_end(self, renderer: Renderer) -> None:
        """Count the teacher's end token for the student's chosen one (`model.end_token`): it then teaches when to end."""
        chosen = getattr(renderer, "end_token", None)
        if chosen is None:
            return
        try:
            own = self.source.renderer()
        except ValueError:  # without tokenizer or chat template of its own
            return
        ends, ids = usual_ends(self.source, own), renderer.tokenizer.get_vocab()
        if chosen not in ends and ends[0] in ids:
            self.exchanged = (ids[chosen], ids[ends[0]])

    def setup(self, student: Student) -> None:
        """Load the weights next to the student's; distributions are over the tokens of both models.

        Raises:
            ValueError: the teacher's output layer is too small for these tokens.
        """
        super().setup(student)
        rows, shared = self.source.vocab_size(), student.head.known
        if self.overlap is not None:
            shared = shared.intersection([self.overlap.shared])
            if rows < shared.size:
                raise ValueError(
                    f"{self.field}={self.source.path} has {rows} rows of logits, and its tokenizer has {shared.size} of the "
                    "student's tokens: not all of them can be read or compared; give it its own tokenizer, or choose another."
                )
        shared, lm = shared.intersection([ValidIds(rows)]), self.source.model()
        if self.exchanged is not None and max(self.exchanged) < rows:
            exchange_rows(lm, *self.exchanged)
        self.model = Frozen(lm, student.chunk, shared, student.lm.device, student.sharding, self.offload)
        self.model.verify_head(f"{self.field}={self.source.path}")
        self.fingerprint = Fingerprint.of(f"{self.field}={self.source.path}", self.model)

    def sizes(self) -> Sizes:
        """The other model's sizes."""
        return Sizes.of(self.model.lm)

    def read(self, batches: Sequence[Sequences]) -> HiddenScores:
        """The other model's distributions."""
        return self.model.read(batches)

    def language_model(self) -> AbstractContextManager[PreTrainedModel]:
        """The other model."""
        return self.model.eval_mode()
