"""A local teacher: a language model in this process that scores the student's tokens behind its own prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Generator, Renderer
from opd_lightning.data.batching import collate, packed_index, plan_micro_batches
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.teachers.alignment.readings import alignment_of
from opd_lightning.teachers.base import BaseTeacher
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.reading import read
from opd_lightning.teachers.weights import Average, External, FrozenStart, Live, Parameters, TrustRegion, Weights
from opd_lightning.types import Completion, Cost, Rendered, Sample, SamplingParams
from opd_lightning.utils.vocabulary import ValidIds


class LocalTeacher(BaseTeacher):
    """A teacher from a weights policy and a context.

    Args:
        weights: the weights, and how they follow the student's; see `teachers.weights`.
        context: builds the teacher's prompt; see `teachers.contexts`. None takes the student's prompt.
        shares_weights: whether the weights are another teacher's, which loads, updates and saves them.
        alignment: how a teacher with another tokenizer is read, see `alignment.readings`; None takes "shared" if it is needed.
    """

    reads_context = True
    gives_hidden_states = True

    def __init__(self, weights: Weights, context: NoContext | None = None, alignment: Any = None, shares_weights: bool = False):
        super().__init__(context)
        self.alignment = alignment_of(alignment)
        self.weights, self.shares_weights = weights, shares_weights
        self.self_teacher, self.frozen, self.writes = weights.self_teacher, weights.frozen, weights.writes
        self.takes_end, self.offload = isinstance(weights, External), weights.offload
        self.source, self.warning = weights.source, weights.warning
        self.output_layer = self.own_tokenizer = weights.source

    @property
    def valid_ids(self) -> ValidIds | None:
        """The ids that the weights have."""
        return self.weights.valid_ids

    def behind(self, context: NoContext) -> "LocalTeacher":
        """A teacher that reads these weights behind another context."""
        return LocalTeacher(self.weights, context, self.alignment, shares_weights=True)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the tokenizer of external weights."""
        if isinstance(self.weights, External):
            self.weights.check_tokenizer(tokenizer)

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Load or copy the weights."""
        super().setup(student, renderer)
        self.check_tokenizer(renderer.tokenizer)
        if self.takes_end:
            self.weights.take_end(renderer)  # type: ignore[attr-defined]
        if not self.shares_weights:
            self.weights.setup(student)
            self.fingerprint = self.weights.fingerprint

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> HiddenScores:
        """The distributions on the samples' trainable tokens; see `reading.read` for those without a target."""
        window = self.student.window if self.source is None else self.source.window()
        reading = read(self, samples, window, self.weights.valid_ids, self.student.lm.device)
        rows, lengths = reading.rows, [reading.length(row) for row in reading.rows]
        plan = [[rows[i] for i in part] for part in plan_micro_batches(lengths, max_tokens)]
        pad, device = self.renderer.tokenizer.pad_token_id, self.student.lm.device  # type: ignore[attr-defined]
        scores = self.weights.read(
            [collate([reading.samples[b] for b in part], pad, device, [reading.prompts[b] for b in part]) for part in plan]
        )
        counts = [sample.trainable for sample in samples]
        hidden = scores.hidden.new_zeros(sum(counts), scores.hidden.shape[-1])
        hidden[torch.cat([packed_index(part, counts) for part in plan]).to(device)] = scores.hidden
        cost = Cost(sum(lengths), self.weights.sizes().read(lengths))
        return replace(scores, hidden=hidden, valid=reading.valid, cost=cost, metrics=reading.metrics)

    def write(
        self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, generator: Generator
    ) -> tuple[list[Completion], Cost]:
        """Completions of the teacher's prompts, and their cost."""
        if not self.writes:
            return super().write(prompts, sampling, seed, generator)
        valid_ids = self.weights.valid_ids
        missing = (
            []
            if valid_ids is None
            else [i for p in prompts for i in p.token_ids if i >= valid_ids.size or i in valid_ids.absent]
        )
        if missing:
            token = self.renderer.tokenizer.convert_ids_to_tokens(missing[0])  # type: ignore[attr-defined]
            raise ValueError(
                f"a prompt holds {token!r}, a token of the student's tokenizer that the teacher lacks, so it cannot write "
                "behind it; choose another teacher, or take such prompts out of the data."
            )
        completions = generator.generate(prompts, sampling, seed, model=self.weights.language_model)
        n = sampling.n
        pairs = [(len(prompts[i // n].token_ids), len(completion.token_ids)) for i, completion in enumerate(completions)]
        return completions, Cost(sum(map(sum, pairs)), self.weights.sizes().write(pairs))

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the model's output layer."""
        return self.weights.sizes().logits(positions)

    def footprint(self, start: Parameters) -> int:
        """Bytes of the weights beside the student."""
        return 0 if self.shares_weights else self.weights.footprint(start)

    def after_update(self) -> None:
        """Update the weights after an optimizer step."""
        if not self.shares_weights:
            self.weights.after_update()

    def state_dict(self) -> dict[str, Any]:
        """The state of the weights."""
        return {} if self.shares_weights else self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the weights."""
        if not self.shares_weights:
            self.weights.load_state_dict(state)


def external(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    context: NoContext | None = None,
    field: str = "teacher.path",
    base: str | None = None,
    alignment: Any = None,
    chat_template: str | None = None,
    offload: bool = False,
) -> LocalTeacher:
    """A teacher that is another model; see `weights.External`, and `alignment.readings` for one with another tokenizer."""
    return LocalTeacher(External(path, dtype, attention, field, base, chat_template, offload), context, alignment)


def frozen(context: NoContext | None = None, offload: bool = False) -> LocalTeacher:
    """A teacher with the student's weights at the start of training."""
    return LocalTeacher(FrozenStart(offload), context)


def average(rate: float, every: int = 1, of: str = "effective", context: NoContext | None = None) -> LocalTeacher:
    """A teacher with a moving average of the student's weights; see `weights.Average`."""
    return LocalTeacher(Average(rate, every, of), context)


def trust_region(share: float, context: NoContext | None = None) -> LocalTeacher:
    """A teacher between the start and the student; see `weights.TrustRegion`."""
    return LocalTeacher(TrustRegion(share), context)


def live(context: NoContext | None = None) -> LocalTeacher:
    """A teacher with the student's current weights."""
    return LocalTeacher(Live(), context)
