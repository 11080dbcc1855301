"""A local teacher: a language model in this process, behind a prompt of its own, reading the tokens that the student wrote."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Generator, Renderer
from opd_lightning.data.batching import collate, packed_index, plan_micro_batches
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.teachers.base import BaseTeacher
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.readable import readable
from opd_lightning.teachers.weights import Average, External, FrozenStart, Live, Parameters, TrustRegion, Weights
from opd_lightning.types import Attempt, Completion, Cost, Rendered, Sample, SamplingParams

log = logging.getLogger(__name__)


class LocalTeacher(BaseTeacher):
    """A weights policy behind a context.

    Args:
        weights: whose weights, and how they follow the student's; see `teachers.weights`.
        context: what the teacher is shown; see `teachers.contexts`. None shows it the student's prompt.
    """

    def __init__(self, weights: Weights, context: NoContext | None = None):
        super().__init__(context)
        self.weights = weights
        self.self_teacher, self.frozen, self.writes = weights.self_teacher, weights.frozen, weights.writes
        self.source, self.warning = weights.source, weights.warning

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The weights' own check, if they have one."""
        if isinstance(self.weights, External):
            self.weights.check_tokenizer(tokenizer)

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Load or copy the weights."""
        super().setup(student, renderer)
        self.check_tokenizer(renderer.tokenizer)
        self.weights.setup(student)

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> HiddenScores:
        """Read the samples; where the context has nothing to tell, or the prompt is too long, tokens are not valid.

        Neither are those from a word on that the teacher does not have; `unreadable` says how many samples have one.
        """
        prompts = self.prompts_of(samples)
        known = None if self.weights.words is None else readable(samples, prompts, self.weights.words)
        if known is not None:
            samples, prompts = known.samples, known.prompts
        behind = [len(sample.token_ids) - sample.prompt_length for sample in samples]
        window = self.student.window if self.source is None else self.source.window()
        limit = self.context.max_prompt_tokens or window
        # What never changes was measured before training; what attempts say may be too long for the teacher.
        waits = self.context.reads_attempts
        fits = [p is not None and (not waits or len(p) <= min(window - n, limit)) for p, n in zip(prompts, behind, strict=True)]
        long = [p is not None and not fit for p, fit in zip(prompts, fits, strict=True)]
        # With nothing to read, one sample is read all the same: other devices may wait for this one's share of the weights.
        rows = [b for b, fit in enumerate(fits) if fit] or [0]
        ids = {b: (prompts[b] if fits[b] else None) or samples[b].token_ids[: samples[b].prompt_length].tolist() for b in rows}
        totals = [len(ids[b]) + behind[b] for b in rows]
        plan = [[rows[i] for i in part] for part in plan_micro_batches(totals, max_tokens)]
        pad, device = self.renderer.tokenizer.pad_token_id, self.student.lm.device  # type: ignore[attr-defined]
        read = self.weights.read([collate([samples[b] for b in part], pad, device, [ids[b] for b in part]) for part in plan])
        counts = [sample.trainable for sample in samples]
        hidden = read.hidden.new_zeros(sum(counts), read.hidden.shape[-1])
        hidden[torch.cat([packed_index(part, counts) for part in plan]).to(device)] = read.hidden
        cost = Cost(sum(totals), self.weights.sizes().read(totals))
        metrics = {} if known is None else {"unreadable": known.cut.float().to(device)}
        valid = None if known is None else known.valid.to(device)
        if not waits:
            return replace(read, hidden=hidden, valid=valid, cost=cost, metrics=metrics)
        told, overlong = torch.tensor(fits, device=device), torch.tensor(long, device=device)
        if overlong.any() and not told.any():
            log.warning(
                "warning: every prompt of the teacher in this rollout is too long with what its context tells, so nothing is "
                "learned from it; raise context.max_prompt_tokens, or lower rollout.sampling.max_new_tokens."
            )
        shown = torch.repeat_interleave(told, torch.tensor(counts, device=device))
        valid = shown if valid is None else shown & valid
        metrics |= {"valid": told.float(), "overlong": overlong.float()}
        return replace(read, hidden=hidden, valid=valid, cost=cost, metrics=metrics)

    def prompts_of(self, samples: Sequence[Sample]) -> list[list[int] | None]:
        """The teacher's prompt for each sample, None where there is nothing to tell."""
        attempts = self.attempts(samples) if self.context.reads_attempts else [None] * len(samples)
        known: dict[str, list[int]] = {}
        ids: list[list[int] | None] = []
        for b, sample in enumerate(samples):
            own = attempts[b]
            others = (
                []
                if own is None
                else [a for i, a in enumerate(attempts) if i != b and a is not None and samples[i].group == sample.group]
            )
            chat = self.context(sample.example, own, others)
            if chat is None:
                ids.append(None)
                continue
            key = repr(chat)
            if key not in known:
                known[key] = self.rendering(chat).token_ids
            ids.append(known[key])
        return ids

    def attempts(self, samples: Sequence[Sample]) -> list[Attempt | None]:
        """The judged completions."""
        texts = self.renderer.decode_all([sample.reply_ids for sample in samples])  # type: ignore[attr-defined]
        return [
            None if sample.verdict is None else Attempt(text, sample.verdict)
            for sample, text in zip(samples, texts, strict=True)
        ]

    def write(
        self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, generator: Generator
    ) -> tuple[list[Completion], Cost]:
        """Completions of prompts as the teacher reads them, and what they cost."""
        if not self.writes:
            return super().write(prompts, sampling, seed, generator)
        words = self.weights.words
        unknown = [] if words is None else [i for p in prompts for i in p.token_ids if i >= words.size or i in words.absent]
        if unknown:
            token = self.renderer.tokenizer.convert_ids_to_tokens(unknown[0])  # type: ignore[attr-defined]
            raise ValueError(
                f"a prompt holds {token!r}, a word of the student's tokenizer that the teacher lacks, so it cannot write "
                "behind it; choose another teacher, or take such prompts out of the data."
            )
        done = generator.generate(prompts, sampling, seed, model=self.weights.language_model)
        n = sampling.n
        pairs = [(len(prompts[i // n].token_ids), len(completion.token_ids)) for i, completion in enumerate(done)]
        return done, Cost(sum(map(sum, pairs)), self.weights.sizes().write(pairs))

    def logit_flops(self, positions: int) -> int:
        """Of the model's output layer."""
        return self.weights.sizes().logits(positions)

    def footprint(self, start: Parameters) -> int:
        """The weights'."""
        return self.weights.footprint(start)

    def after_update(self) -> None:
        """The weights follow."""
        self.weights.after_update()

    def state_dict(self) -> dict[str, Any]:
        """The weights'."""
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The weights'."""
        self.weights.load_state_dict(state)


def external(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    context: NoContext | None = None,
    field: str = "teacher.path",
    base: str | None = None,
) -> LocalTeacher:
    """Another model with the same tokenizer; see `weights.External`."""
    return LocalTeacher(External(path, dtype, attention, field, base), context)


def frozen(context: NoContext | None = None) -> LocalTeacher:
    """The student as it was when training began."""
    return LocalTeacher(FrozenStart(), context)


def average(rate: float, every: int = 1, of: str = "effective", context: NoContext | None = None) -> LocalTeacher:
    """A moving average of the student; see `weights.Average`."""
    return LocalTeacher(Average(rate, every, of), context)


def trust_region(share: float, context: NoContext | None = None) -> LocalTeacher:
    """Between the start and the student; see `weights.TrustRegion`."""
    return LocalTeacher(TrustRegion(share), context)


def live(context: NoContext | None = None) -> LocalTeacher:
    """The student as it is now."""
    return LocalTeacher(Live(), context)
