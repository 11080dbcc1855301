"""A teacher with another tokenizer: it reads the student's text in its own tokens, behind its own chat template."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_lightning.contracts import Renderer
from opd_lightning.data.alignment import Alignment, align, shared_tokens, with_end
from opd_lightning.data.beginnings import token_classes
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.data.token_bytes import TokenBytes
from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.teachers.alignment.match import Match, SharedIds, pack_spans
from opd_lightning.teachers.alignment.readings import alignment_of
from opd_lightning.teachers.base import BaseTeacher, Composite
from opd_lightning.teachers.weights.base import Parameters
from opd_lightning.teachers.weights.external import AnotherTokenizer
from opd_lightning.types import Example, Rendered, Sample, SamplingParams
from opd_lightning.utils.vocabulary import ValidIds

log = logging.getLogger(__name__)


def aligned(teacher: Any, renderer: ChatRenderer) -> Any:
    """The teacher for a student with this renderer: itself, or an `AlignedTeacher` where it has another tokenizer.

    A teacher that is made of others is made again of aligned ones, unless it reads one tokenizer as a whole.

    Raises:
        ValueError: it fits in neither way.
    """
    if isinstance(teacher, Composite) and teacher.own_tokenizer is None:
        found = {name: aligned(part, renderer) for name, part in teacher.teachers.items()}
        teacher = teacher if all(found[name] is part for name, part in teacher.teachers.items()) else teacher.remade(found)
        teacher.check_tokenizer(renderer.tokenizer)
        return teacher
    reading = alignment_of(teacher.alignment)
    if reading is None:
        try:
            teacher.check_tokenizer(renderer.tokenizer)
            return teacher
        except AnotherTokenizer:
            if teacher.own_tokenizer is None:
                raise
        log.info(
            f"{teacher.own_tokenizer.name} has another tokenizer than the student: they are compared on the tokens that both "
            "have (teacher.alignment=shared)"
        )
        reading = alignment_of("shared")
    return AlignedTeacher(teacher, reading, renderer)


@dataclass(frozen=True)
class OtherVocabulary:
    """The student as a teacher with another vocabulary sees it: its device, with the teacher's own ids.

    Attributes:
        lm, chunk, window: the student's.
        known: the teacher's valid ids.
        sharding: of `Student`.
    """

    lm: Any
    chunk: int
    window: int
    known: ValidIds
    sharding: Any = None

    @property
    def head(self) -> "OtherVocabulary":
        """What has the ids that there are logits for: itself."""
        return self


@dataclass(frozen=True)
class Pair:
    """A sample in the teacher's tokens, and how its completion's tokens match the student's.

    Attributes:
        sample: as the teacher reads it.
        alignment: of the completions.
        exact, faithful: of each token of the student's, and of the teacher's; see `Spelling`.
    """

    sample: Sample
    alignment: Alignment
    exact: np.ndarray
    faithful: np.ndarray


class AlignedTeacher(BaseTeacher):
    """A teacher that scores the student's text in tokens of its own.

    Args:
        teacher: scores samples in its own tokens; its `own_tokenizer` is the model that these are of.
        alignment: a reading; see `readings.py`.
        renderer: the student's.

    Raises:
        ValueError: it has no tokenizer of its own, or does not provide what the reading needs.
    """

    aligned = apart = True

    def __init__(self, teacher: Any, alignment: Any, renderer: ChatRenderer):
        super().__init__(teacher.context)
        name = type(alignment).__name__
        if teacher.own_tokenizer is None:
            raise ValueError(
                f"teacher.alignment={name}: {type(teacher).__name__} has the student's tokenizer, or does not say which; "
                "set teacher.alignment=null, or teacher.tokenizer=<folder or hub id> of the served model."
            )
        self.inner, self.alignment, self.renderer = teacher, alignment, renderer
        self.provides, self.top_k = alignment.provides(teacher.provides), teacher.top_k
        if not self.provides:
            raise ValueError(f"teacher.alignment={name} needs more than {type(teacher).__name__} tells; choose spans.")
        self.offload = teacher.offload
        self.self_teacher, self.frozen, self.scores_any_text = teacher.self_teacher, teacher.frozen, teacher.scores_any_text
        self.reads_context, self.source, self.warning = teacher.reads_context, teacher.source, teacher.warning
        self.shares_weights = teacher.shares_weights
        self.own_tokenizer = teacher.own_tokenizer
        self.own = teacher.own_tokenizer.renderer(renderer.template.today)
        teacher.check_tokenizer(self.own.tokenizer)
        self.student_bytes, self.teacher_bytes = TokenBytes(renderer.tokenizer), TokenBytes(self.own.tokenizer)
        same = self.student_bytes.table == self.teacher_bytes.table
        self.same_tokens = same and renderer.tokenizer.get_vocab() == self.own.tokenizer.get_vocab()
        self.ids = shared_tokens(self.student_bytes, self.teacher_bytes, (renderer.end_id, self.own.end_id))
        self.to_teacher = dict(zip(*self.ids, strict=True))

    @cached_property
    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """The classes of tokens that begin the same text; takes seconds for large vocabularies."""
        return token_classes(self.student_bytes, self.teacher_bytes, self.ids)

    def describe(self) -> str:
        """How much of the vocabularies is shared, as text."""
        sizes = [len(tokens.tokenizer.get_vocab()) for tokens in (self.student_bytes, self.teacher_bytes)]
        text = f"another tokenizer ({type(self.alignment).__name__}): {len(self.ids[0])} of the student's {sizes[0]} tokens"
        text = f"{text} and of its {sizes[1]} are the same bytes"
        if not getattr(self.alignment, "groups_tokens", False):
            return text
        mine, theirs = self.classes
        grouped = [int(np.isin(a, b).sum()) - len(self.ids[0]) for a, b in ((mine, theirs), (theirs, mine))]
        return f"{text}; {grouped[0]} and {grouped[1]} others count under the token that the other side would write first"

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Set up the teacher with its own renderer, on the student's device."""
        super().setup(student, renderer)
        device, known = student.lm.device, student.head.known
        if self.own.valid_ids is None:
            raise ValueError(f"{self.own.tokenizer} has no tokens.")
        served = getattr(self.inner, "window", None) or student.window
        self.window = served if self.source is None else self.source.window()
        seen = OtherVocabulary(student.lm, student.chunk, student.window, self.own.valid_ids, student.sharding)
        self.inner.setup(seen, self.own)
        self.fingerprint = self.inner.parts[0].fingerprint
        student_ids, teacher_ids = (torch.tensor(ids, dtype=torch.long, device=device) for ids in self.ids)
        classes = None
        if getattr(self.alignment, "groups_tokens", False):
            mine, theirs = (torch.from_numpy(part).to(device) for part in self.classes)
            classes = (mine, theirs)
        self.shared = SharedIds(student_ids, teacher_ids, known, classes)

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> Any:
        """The teacher's scores of the text, as the reading gives them to the student's tokens.

        Raises:
            ValueError: a sample has turns of an environment.
        """
        pairs = [self.pair(sample) for sample in samples]
        scores = self.inner.score([pair.sample for pair in pairs], max_tokens)
        return self.alignment.scores(scores, self.match(samples, pairs))

    def pair(self, sample: Sample) -> Pair:
        """A sample in the teacher's tokens.

        Raises:
            ValueError: it has turns of an environment, which would have to be rendered anew.
        """
        if not sample.loss_mask[sample.prompt_length :].all():
            raise ValueError(
                f"teacher.alignment: the completion of example {sample.example.id} has turns of an environment, which are in "
                "the student's chat template; use environment=single_turn, or a teacher with the student's tokenizer."
            )
        completion = sample.completion_ids
        ended = bool(completion) and completion[-1] in self.renderer.end_ids
        end = [self.to_teacher.get(completion[-1], self.own.end_id)] if ended else []
        if end and end[0] not in self.own.end_ids:
            end = [self.own.end_id]
        room = max(self.window - self.prompt_length(sample), 0)
        if self.same_tokens:
            ends = np.arange(1, len(completion) + 1)
            spans = align(ends, ends).up_to(room)
            return Pair(self.translated(sample, completion[:room]), spans, *(np.ones(len(completion), dtype=bool),) * 2)
        student = self.student_bytes.spell(completion[:-1] if ended else completion)
        teacher = self.teacher_bytes.encode(student.text)
        spans = align(with_end(student, ended), with_end(teacher, ended)).up_to(room)
        marks = [np.append(spelling.exact, np.ones(int(ended), dtype=bool)) for spelling in (student, teacher)]
        return Pair(self.translated(sample, [*teacher.ids, *end][:room]), spans, *marks)

    def prompt_length(self, sample: Sample) -> int:
        """The tokens of the teacher's prompt; one that is made of attempts is checked against its window when it is read."""
        chat = None if self.context.needs_rollouts else self.context(sample.example)
        return len(self.rendering(sample.example.messages if chat is None else chat).token_ids)

    def translated(self, sample: Sample, ids: list[int]) -> Sample:
        """The sample with a completion in the teacher's tokens, at least one, behind the prompt in its own."""
        prompt = self.rendering(sample.example.messages).token_ids
        ids = ids or [self.own.end_id]
        mask = torch.arange(len(prompt) + len(ids)) >= len(prompt)
        tokens = torch.tensor([*prompt, *ids], dtype=torch.long)
        return replace(sample, token_ids=tokens, loss_mask=mask, prompt_length=len(prompt), logprobs=None)

    def match(self, samples: Sequence[Sample], pairs: Sequence[Pair]) -> Match:
        """The spans of all samples on the packed axes."""
        device = self.student.lm.device
        read = [pair.sample for pair in pairs]
        counts = [[sample.trainable for sample in part] for part in (samples, read)]
        packed = pack_spans([pair.alignment for pair in pairs], *counts)
        exact = [
            np.logical_and.reduceat(pair.exact[: pair.alignment.student[-1]], pair.alignment.student[:-1])
            for pair in pairs
            if len(pair.alignment.bounds) > 1
        ]
        faithful = [pair.faithful[pair.alignment.teacher[:-1]] for pair in pairs]
        logprobs = [sample.logprobs[sample.loss_mask] for sample in samples if sample.logprobs is not None]
        columns = {
            **packed,
            "exact": torch.from_numpy(np.concatenate([np.zeros(0, dtype=bool), *exact])),
            "faithful": torch.from_numpy(np.concatenate([np.zeros(0, dtype=bool), *faithful])),
            "student_ids": trainable_ids(samples),
            "teacher_ids": trainable_ids(read),
            "sample": torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts[0])),
        }
        return Match(
            **{name: column.to(device) for name, column in columns.items()},
            sampler_logprob=torch.cat(logprobs).to(device) if len(logprobs) == len(samples) else None,
            vocabulary=self.shared.known,
            shared=self.shared,
        )

    def rendering(self, chat: Any, tools: Sequence[Any] | None = None) -> Rendered:
        """A chat, rendered with this teacher's own template."""
        return self.own.with_options(self.context.template_options).render(chat, tools)

    def answers(self, prompts: Sequence[Rendered], sampling: SamplingParams) -> list[str] | None:
        """Texts that the teacher writes behind prompts in its own tokens; None if its weights are not here."""
        if not self.inner.writes:
            return None
        generator = TransformersGenerator(self.own.tokenizer, self.own, pack_weights=False)
        completions = generator.generate(prompts, sampling, 0, model=self.inner.weights.language_model)
        return self.own.decode_all([completion.token_ids for completion in completions])

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check the examples for the teacher."""
        self.inner.check_examples(examples)

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the teacher's logits on as many positions of its own."""
        return int(self.inner.logit_flops(positions))

    def footprint(self, start: Parameters) -> int:
        """Bytes of the teacher beside its source."""
        return int(self.inner.footprint(start))

    def after_update(self) -> None:
        """Update the teacher after an optimizer step."""
        self.inner.after_update()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state."""
        return dict(self.inner.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the teacher's state."""
        self.inner.load_state_dict(state)


def trainable_ids(samples: Sequence[Sample]) -> Tensor:
    """The trainable tokens of samples, packed."""
    return torch.cat([sample.token_ids[sample.loss_mask] for sample in samples])
