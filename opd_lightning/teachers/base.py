"""Base classes of teachers, with defaults for the optional part of the contract."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Generator, Provides, Renderer
from opd_lightning.models import Pretrained
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.contexts.builders import check_members
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.teachers.weights.base import Parameters
from opd_lightning.types import Completion, Cost, Example, Rendered, SamplingParams
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of


class BaseTeacher:
    """A teacher that scores, does not generate, never changes and has no state.

    Attributes:
        provides, top_k: see `contracts.Teacher`.
        context: builds its prompt from the example; see `teachers.contexts`.
        self_teacher: whether its weights come from the student.
        frozen: whether it never changes.
        offload: whether its weights are on the host between scorings.
        writes: whether it can generate completions.
        reads_context: whether `score` builds its prompts from the context.
        shares_weights: whether its weights are another teacher's.
        scores_any_text: whether `score` takes samples that it has not seen before.
        gives_hidden_states: whether its scores are `HiddenScores` of one model.
        output_layer: the model that maps these to logits; None for the student's start model.
        source: its `Pretrained`; None for the student, or no local model.
        own_tokenizer: the `Pretrained` whose tokenizer it reads; None for the student's.
        alignment: the reading of a teacher with another tokenizer (`alignment.readings`); None chooses one where it is needed.
        aligned: whether it reads text in tokens of its own.
        apart: whether its targets are over outcomes of its own, such as classes of the student's tokens.
        served: whether a server computes its scores, so that `score` may run in another thread while the student trains.
        takes_end: whether its end token is counted for the one that `model.end_token` chooses.
        fingerprint: by which a resumed run knows a model again that its checkpoint does not hold, after `setup`; or None.
        warning: a sentence for the user, or None.
    """

    provides: frozenset[Provides] = frozenset({"full", "topk", "sampled"})
    top_k: int | None = None
    fingerprint: Fingerprint | None = None
    context: Any
    self_teacher = False
    frozen = True
    offload = False
    writes = False
    reads_context = False
    shares_weights = False
    scores_any_text = True
    gives_hidden_states = False
    served = False
    output_layer: Pretrained | None = None
    source: Pretrained | None = None
    warning: str | None = None
    own_tokenizer: Pretrained | None = None
    alignment: Any = None
    aligned = False
    apart = False
    takes_end = False

    def __init__(self, context: NoContext | None = None):
        self.context = NoContext() if context is None else context
        check_members(self.context)

    @property
    def parts(self) -> Sequence[Any]:
        """The single teachers in it: itself."""
        return [self]

    @property
    def valid_ids(self) -> ValidIds | None:
        """The ids that it has, where the student has more; None where it has all, or they are not known before it scores."""
        return None

    def behind(self, context: NoContext) -> Any:
        """A teacher that reads the same weights behind another context; raises ValueError if it has none of its own."""
        raise ValueError("has no single set of weights to share")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the student's tokenizer before loading; raises ValueError if it does not fit."""

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check the examples before loading; raises ValueError if one cannot be scored."""

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Set student and renderer; there are no weights to load."""
        self.student, self.renderer = student, renderer

    def prompts(self, examples: Sequence[Example]) -> list[Rendered | None]:
        """The teacher's prompts; None where the context needs an attempt."""
        return [None if (chat := self.context(e)) is None else self.rendering(chat, e.tools) for e in examples]

    def rendering(self, chat: Any, tools: Sequence[Any] | None = None) -> Rendered:
        """A chat, rendered with this teacher's template options."""
        return self.renderer.with_options(self.context.template_options).render(chat, tools)  # type: ignore[attr-defined]

    def write(
        self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, generator: Generator
    ) -> tuple[list[Completion], Cost]:
        """Completions of the teacher's prompts, and their cost."""
        raise ValueError(f"teacher={type(self).__name__} can only score; choose teacher=frozen, ema or external to write.")

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the logits of `positions` positions; 0."""
        return 0

    def footprint(self, start: Parameters) -> int:
        """Bytes of memory beside the student, without its `source`; 0."""
        return 0

    def after_update(self) -> None:
        """Update the teacher after an optimizer step; nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The state for the checkpoint; empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint; there is none."""


class SharedWeights(BaseTeacher):
    """The weights of another teacher behind a context of its own, in a configuration; `linked` replaces it.

    Args:
        of: name of the teacher that has the weights, such as "teacher".
        context: builds the prompt; see `teachers.contexts`.
    """

    reads_context = True

    def __init__(self, of: str, context: NoContext | None = None):
        super().__init__(context)
        self.of = of

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Raises ValueError: it was not replaced."""
        raise ValueError(f"of={self.of} names a teacher that is not here; choose teacher=external or frozen.")


def linked(teachers: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The teachers, with a reader of the same weights in place of each `SharedWeights`: weights are loaded once.

    Args:
        teachers: by name.
        place: of the names in the configuration, for errors, such as "teacher.teachers.".

    Raises:
        ValueError: a `SharedWeights` names no teacher that has weights of its own.
    """
    owners = {name: teacher for name, teacher in teachers.items() if not isinstance(teacher, SharedWeights)}
    found = dict(teachers)
    for name, teacher in teachers.items():
        if isinstance(teacher, SharedWeights):
            try:
                if teacher.of not in owners:
                    raise ValueError("is no teacher with weights that is loaded beside it")
                found[name] = owners[teacher.of].behind(teacher.context)
            except ValueError as error:
                choice = f"there are {', '.join(owners)}" if owners else "there is no other teacher"
                raise ValueError(f"{place}{name}.of={teacher.of} {error}; {choice}.") from error
    return found


class Composite(BaseTeacher):
    """A teacher composed of other teachers.

    Args:
        teachers: the teachers by name.

    Raises:
        ValueError: there are none, or one shares weights that no other has.
    """

    def __init__(self, teachers: dict[str, Any]):
        super().__init__()
        if not teachers:
            raise ValueError("teacher.teachers is empty; give teachers by name (teacher.teachers.<name>=...).")
        self.teachers = linked(teachers, "teacher.teachers.")
        provided = [teacher.provides for teacher in self.teachers.values()]
        self.provides = frozenset.intersection(*provided)
        self.top_k = min((t.top_k for t in self.teachers.values() if t.top_k is not None), default=None)
        self.scores_any_text = all(teacher.scores_any_text for teacher in self.teachers.values())
        self.self_teacher = all(teacher.self_teacher for teacher in self.teachers.values())
        self.frozen = all(teacher.frozen for teacher in self.teachers.values())
        self.warning = next((t.warning for t in self.teachers.values() if t.warning), None)

    @property
    def parts(self) -> Sequence[Any]:
        """The parts of all teachers."""
        return [part for teacher in self.teachers.values() for part in teacher.parts]

    def remade(self, teachers: dict[str, Any]) -> "Composite":
        """The same of other teachers by the same names; raises ValueError where it does not take them."""
        raise ValueError(
            f"teacher={type(self).__name__} takes no teachers with another tokenizer than the student's (it has no method "
            "`remade`); choose teachers of the student's family."
        )

    @property
    def apart(self) -> bool:  # type: ignore[override]
        """Whether the targets of a teacher in it are over outcomes of their own."""
        return any(part.apart for part in self.parts)

    def behind(self, context: NoContext) -> Any:
        """A reader of the one set of weights in it, such as those of a top-k view; raises ValueError if there are several."""
        return self.parts[0].behind(context) if len(self.parts) == 1 else super().behind(context)

    @property
    def valid_ids(self) -> ValidIds | None:
        """The ids that all teachers have."""
        known = [ids for teacher in self.teachers.values() if (ids := teacher.valid_ids) is not None]
        return known[0].intersection(known[1:]) if known else None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the tokenizer for each teacher."""
        for teacher in self.teachers.values():
            teacher.check_tokenizer(tokenizer)
        if "full" not in self.provides and not self.apart:
            check_same_ids([teacher.valid_ids for teacher in self.teachers.values()])

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check all examples for each teacher."""
        for teacher in self.teachers.values():
            teacher.check_examples(examples)

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Set up each teacher."""
        super().setup(student, renderer)
        for teacher in self.teachers.values():
            teacher.setup(student, renderer)

    def logit_flops(self, positions: int) -> int:
        """FLOPs of all teachers' logits on these positions."""
        return sum(teacher.logit_flops(positions) for teacher in self.teachers.values())

    def footprint(self, start: Parameters) -> int:
        """Bytes of all teachers."""
        return sum(teacher.footprint(start) for teacher in self.teachers.values())

    def after_update(self) -> None:
        """Update each teacher."""
        for teacher in self.teachers.values():
            teacher.after_update()

    def state_dict(self) -> dict[str, Any]:
        """The states of the teachers, by name."""
        return {name: teacher.state_dict() for name, teacher in self.teachers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states of the teachers, by name."""
        for name, teacher in self.teachers.items():
            teacher.load_state_dict(state[name])


def check_same_ids(ids: Sequence[ValidIds | None]) -> None:
    """Check that teachers of a few tokens have the same ids: their targets cannot be renormalised to others.

    Raises:
        ValueError: they do not.
    """
    if len(set(ids)) > 1:
        raise ValueError(
            "teacher.teachers differ in the tokens that they have, and log-probabilities of a few tokens cannot be "
            "renormalised to those that all have; choose teachers of one tokenizer, or of the whole vocabulary."
        )


def all_parts(teachers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each part of each teacher, with the teacher's name, numbered where a teacher has several parts."""
    for name, teacher in teachers.items():
        parts = list(teacher.parts)
        for i, part in enumerate(parts):
            yield (name if len(parts) == 1 else f"{name} {i + 1}"), part


class CombinedScores:
    """The vocabulary of scores that are made of several teachers' scores: the ids that all of them have."""

    parts: Sequence[Any]

    @property
    def vocabulary(self) -> int:
        """The size of the shared vocabulary."""
        return self.valid_ids.size

    @property
    def absent(self) -> tuple[int, ...]:
        """The ids below it that a part lacks."""
        return self.valid_ids.absent

    @property
    def valid_ids(self) -> ValidIds:
        """The ids that all parts have."""
        return valid_ids_of(self.parts[0]).intersection(valid_ids_of(part) for part in self.parts[1:])
