"""What teachers have in common: defaults for all of the contract that is optional."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Generator, Provides, Renderer
from opd_lightning.models import Pretrained
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.weights.base import Parameters
from opd_lightning.types import Completion, Cost, Example, Rendered, SamplingParams


class BaseTeacher:
    """A teacher that scores, cannot write, never moves and remembers nothing.

    Attributes:
        provides, top_k: see `contracts.Teacher`.
        context: what it is shown beside the student's prompt.
        self_teacher: do its weights come from the student?
        frozen: does it stay what it is?
        writes: can it write?
        source: the `Pretrained` that it is; None where it is the student, or no local model.
        warning: what a user should know before choosing it.
    """

    provides: frozenset[Provides] = frozenset({"full", "topk", "sampled"})
    top_k: int | None = None
    context: Any
    self_teacher = False
    frozen = True
    writes = False
    source: Pretrained | None = None
    warning: str | None = None

    def __init__(self, context: NoContext | None = None):
        self.context = NoContext() if context is None else context

    @property
    def parts(self) -> Sequence[Any]:
        """The teachers that it is made of: itself."""
        return [self]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before anything is loaded; raises ValueError if the student's tokenizer does not fit."""

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Before anything is loaded; raises ValueError if an example cannot be scored."""

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Nothing to load."""
        self.student, self.renderer = student, renderer

    def prompts(self, examples: Sequence[Example]) -> list[Rendered | None]:
        """The teacher's prompts that need no attempt; None where the context waits for one."""
        return [None if (chat := self.context(e)) is None else self.rendering(chat) for e in examples]

    def rendering(self, chat: Any) -> Rendered:
        """A chat as this teacher reads it."""
        return self.renderer.with_options(self.context.template_options).render(chat)  # type: ignore[attr-defined]

    def write(
        self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, generator: Generator
    ) -> tuple[list[Completion], Cost]:
        """Completions of prompts as the teacher reads them, and what they cost."""
        raise ValueError(f"teacher={type(self).__name__} can only score; choose teacher=frozen, ema or external to write.")

    def logit_flops(self, positions: int) -> int:
        """Nothing."""
        return 0

    def footprint(self, start: Parameters) -> int:
        """Bytes that it holds beside the student, without its `source`."""
        return 0

    def after_update(self) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to remember."""


class Composite(BaseTeacher):
    """A teacher made of others.

    Args:
        teachers: by name.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, teachers: dict[str, Any]):
        super().__init__()
        if not teachers:
            raise ValueError("teacher.teachers is empty; give teachers by name (teacher.teachers.<name>=...).")
        self.teachers = dict(teachers)
        given = [teacher.provides for teacher in self.teachers.values()]
        self.provides = frozenset.intersection(*given)
        self.top_k = min((t.top_k for t in self.teachers.values() if t.top_k is not None), default=None)
        self.self_teacher = all(teacher.self_teacher for teacher in self.teachers.values())
        self.frozen = all(teacher.frozen for teacher in self.teachers.values())
        self.warning = next((t.warning for t in self.teachers.values() if t.warning), None)

    @property
    def parts(self) -> Sequence[Any]:
        """Theirs."""
        return [part for teacher in self.teachers.values() for part in teacher.parts]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """All must fit."""
        for teacher in self.teachers.values():
            teacher.check_tokenizer(tokenizer)

    def check_examples(self, examples: Sequence[Example]) -> None:
        """All of them, unless told otherwise."""
        for teacher in self.teachers.values():
            teacher.check_examples(examples)

    def setup(self, student: Any, renderer: Renderer) -> None:
        """All are set up."""
        super().setup(student, renderer)
        for teacher in self.teachers.values():
            teacher.setup(student, renderer)

    def logit_flops(self, positions: int) -> int:
        """Of all of them on these positions."""
        return sum(teacher.logit_flops(positions) for teacher in self.teachers.values())

    def footprint(self, start: Parameters) -> int:
        """Theirs together."""
        return sum(teacher.footprint(start) for teacher in self.teachers.values())

    def after_update(self) -> None:
        """All follow."""
        for teacher in self.teachers.values():
            teacher.after_update()

    def state_dict(self) -> dict[str, Any]:
        """Theirs by name."""
        return {name: teacher.state_dict() for name, teacher in self.teachers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Theirs by name."""
        for name, teacher in self.teachers.items():
            teacher.load_state_dict(state[name])


def all_parts(teachers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each part of each teacher, with the teacher's name; a part of several says which one it is."""
    for name, teacher in teachers.items():
        parts = list(teacher.parts)
        for i, part in enumerate(parts):
            yield (name if len(parts) == 1 else f"{name} {i + 1}"), part
