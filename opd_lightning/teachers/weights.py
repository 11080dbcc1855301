"""Weights policies: which weights the teacher has, and how they follow the student's.

A policy is a plain object that the module holds, not a submodule of it: its weights stay out of the optimizer and of DDP
and FSDP; what it must remember goes into the checkpoint by `state_dict`.

    attach(student)            once, on the student's device, before a checkpoint is restored: load or copy
    read(student, batches)     next-token distributions on the completions of all batches, as one `LogitSource`
    lend(student)              context manager: the weights as a language model in eval mode, to write with
    after_update(student)      after each optimizer step
    sizes(student)             what decides how many FLOPs it takes
    footprint(start)           bytes that it will hold beside a student with these `Weights`, known before anything is loaded
    state_dict(), load_state_dict(state)   what a resumed run cannot make again
    self_teacher               do the weights come from the student itself?
    fixed                      do they stay what they are? What a fixed teacher wrote can be used again.
    writes                     can it write, or only score?
    source                     the `Pretrained` they come from; None where that is the student's
    caution                    what a user should know before choosing it, or None
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.flops import Sizes
from opd_lightning.types import LogitSource, Sequences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A student's weights in numbers: all of them, those in the layers' matrices, those trained, and bytes of each.

    `adapted` says that a fresh adapter is trained and the rest stays.
    """

    all: int
    layers: int
    trained: int
    width: int
    adapted: bool


class _Plain:
    """What most policies have in common: they write, warn of nothing, come from no other model and remember nothing."""

    writes = True
    caution: str | None = None
    source: Pretrained | None = None

    def sizes(self, student: Student) -> Sizes:
        """The student's."""
        return Sizes.of(student.lm)

    def footprint(self, start: Weights) -> int:
        """Nothing."""
        return 0

    def after_update(self, student: Student) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to remember."""


class FrozenStart(_Plain):
    """The student as it was when training began: a copy, or the student without its adapter where that is the same."""

    self_teacher = True
    fixed = True

    def attach(self, student: Student) -> None:
        """Copy the student, unless it is its own start without a fresh adapter.

        A resumed run attaches before its checkpoint is read, so this is the start in any case.
        """
        fresh = adapters.is_fresh(student.lm)
        self.model = None if fresh else copy.deepcopy(student).requires_grad_(False).eval()

    def footprint(self, start: Weights) -> int:
        """A copy, where switching the adapter off is not enough."""
        return 0 if start.adapted else start.all * start.width

    @contextmanager
    def lend(self, student: Student) -> Iterator[PreTrainedModel]:
        """The start."""
        if self.model is not None:
            with self.model.evaluating() as lm:
                yield lm
        else:
            with student.evaluating() as lm, adapters.switched_off(lm):
                yield lm

    def read(self, student: Student, batches: Sequence[Sequences]) -> LogitSource:
        """The start's distributions."""
        with self.lend(student):
            return (student if self.model is None else self.model).read(batches)


class External(_Plain):
    """Another model with the same tokenizer.

    Args:
        path, dtype, attention: as for `Pretrained`.
        tokenizer: the student's, to compare with before anything is loaded.

    Raises:
        ValueError: the tokenizers differ.
    """

    self_teacher = False
    fixed = True
    source: Pretrained

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

    def sizes(self, student: Student) -> Sizes:
        """The other model's."""
        return Sizes.of(self.model.lm)

    def read(self, student: Student, batches: Sequence[Sequences]) -> LogitSource:
        """The other model's distributions."""
        return self.model.read(batches)

    def lend(self, student: Student) -> AbstractContextManager[PreTrainedModel]:
        """The other model."""
        return self.model.evaluating()


class Live(_Plain):
    """The student itself, at its current weights."""

    self_teacher = True
    fixed = False
    caution = "teacher=live follows every mistake of its student and may collapse (SDPO's ablation); use it to show just that."

    def attach(self, student: Student) -> None:
        """Nothing to load."""

    def read(self, student: Student, batches: Sequence[Sequences]) -> LogitSource:
        """The student's own distributions as they are now, whatever updates follow on the same rollout."""
        return student.read(batches, snapshot=True)

    def lend(self, student: Student) -> AbstractContextManager[PreTrainedModel]:
        """The student."""
        return student.evaluating()


class TrustRegion(_Plain):
    """Between the start and the student: T is proportional to start^(1 - share) x student^share (SDPO, arXiv 2601.20802).

    Args:
        share: of the student, in (0, 1): logits are interpolated.
    """

    self_teacher = True
    fixed = False
    writes = False

    def __init__(self, share: float):
        if not 0 < share < 1:
            raise ValueError(f"teacher.share={share} must lie in (0, 1); teacher=frozen is 0, teacher=live is 1.")
        self.share, self.start = share, FrozenStart()

    def attach(self, student: Student) -> None:
        """Keep the start."""
        self.start.attach(student)

    def footprint(self, start: Weights) -> int:
        """The start's."""
        return self.start.footprint(start)

    def sizes(self, student: Student) -> Sizes:
        """Those of two models."""
        return Sizes.of(student.lm).times(2)

    def read(self, student: Student, batches: Sequence[Sequences]) -> LogitSource:
        """Both models' hidden states side by side; logits are interpolated chunk by chunk."""
        start, now = self.start.read(student, batches), student.read(batches, snapshot=True)
        width = start.hidden.shape[-1]

        def project(hidden: Tensor, out: Tensor | None = None) -> Tensor:
            return start.project(hidden[:, :width], out).lerp_(now.project(hidden[:, width:]), self.share)

        return LogitSource(torch.cat([start.hidden, now.hidden], -1), project, start.vocabulary)

    def lend(self, student: Student) -> AbstractContextManager[PreTrainedModel]:
        """It is no language model of its own."""
        raise ValueError("teacher=trust_region mixes two models and cannot write; choose teacher=frozen or teacher=ema.")


class Average(_Plain):
    """A moving average of the student: a <- (1 - rate) a + rate student, after every `every`-th optimizer step.

    A rate of 1 copies the student now and then (periodic sync). The average is kept in float32. Of a student with a low-rank
    adapter it is, by `of`, the average of what the adapter adds to each weight ("effective": exact, and as large as the adapted
    layers), or of the factors themselves ("factors": small, and an approximation: the product of averages is not the average of
    products; it starts from the student's own factors, whose product is zero).

    Args:
        rate: in (0, 1]; SDFT uses 0.01 to 0.05 (arXiv 2601.19897), SDPO 0.01 and 0.05 (arXiv 2601.20802).
        every: optimizer steps.
        of: "effective" or "factors"; without an adapter both are the weights.
    """

    self_teacher = True
    fixed = False

    def __init__(self, rate: float, every: int = 1, of: str = "effective"):
        if not 0 < rate <= 1:
            raise ValueError(f"teacher.rate={rate} must lie in (0, 1]; 0.02 is usual, and teacher=frozen never moves.")
        if every < 1:
            raise ValueError(f"teacher.every={every} must be at least 1 optimizer step.")
        if of not in ("effective", "factors"):
            raise ValueError(f"teacher.of={of!r} is unknown; choose effective or factors.")
        self.rate, self.every, self.of = rate, every, of
        self.updates = 0

    def attach(self, student: Student) -> None:
        """Begin where the student begins."""
        self.dense = self.of == "effective" and bool(adapters.layers(student.lm))
        self.average = {name: value.clone() for name, value in self.current(student).items()}
        size = sum(value.nbytes for value in self.average.values()) / 2**20
        log.info(
            f"the teacher's average takes {size:,.0f} MiB ({'effect of the adapter' if self.dense else 'trained weights'})"
        )

    def footprint(self, start: Weights) -> int:
        """In float32, of what is averaged."""
        return 4 * (start.layers if start.adapted and self.of == "effective" else start.trained)

    def current(self, student: Student) -> dict[str, Tensor]:
        """The tensors that are averaged, as the student has them now, in float32."""
        if self.dense:
            return adapters.dense(student.lm)
        return {name: p.detach().float() for name, p in student.named_parameters() if p.requires_grad}

    def after_update(self, student: Student) -> None:
        """Follow the student."""
        self.updates += 1
        if self.updates % self.every == 0:
            with student.evaluating():
                for name, value in self.current(student).items():
                    self.average[name].lerp_(value, self.rate)

    @contextmanager
    def lend(self, student: Student) -> Iterator[PreTrainedModel]:
        """The student with the averages in its place."""
        with student.evaluating() as lm:
            if not self.dense:
                with adapters.substituted(student, self.average):
                    yield lm
            else:
                with adapters.switched_off(lm), adapters.added(lm, self.average):
                    yield lm

    def read(self, student: Student, batches: Sequence[Sequences]) -> LogitSource:
        """The average's distributions, whatever updates follow on the same rollout."""
        with self.lend(student):
            return student.read(batches, snapshot=True)

    def state_dict(self) -> dict[str, Any]:
        """The average, which no other part of a checkpoint holds."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an average."""
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
