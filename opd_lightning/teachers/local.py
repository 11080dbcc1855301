"""A local teacher: a language model in this process that scores the student's tokens behind its own prompt."""

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
    """A teacher from a weights policy and a context.

    Args:
        weights: the weights, and how they follow the student's; see `teachers.weights`.
        context: builds the teacher's prompt; see `teachers.contexts`. None takes the student's prompt.
    """

    reads_context = True

    def __init__(self, weights: Weights, context: NoContext | None = None):
        super().__init__(context)
        self.weights = weights
        self.self_teacher, self.frozen, self.writes = weights.self_teacher, weights.frozen, weights.writes
        self.source, self.warning = weights.source, weights.warning

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the tokenizer of external weights."""
        if isinstance(self.weights, External):
            self.weights.check_tokenizer(tokenizer)

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Load or copy the weights."""
        super().setup(student, renderer)
        self.check_tokenizer(renderer.tokenizer)
        self.weights.setup(student)

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> HiddenScores:
        """Score the samples; tokens are not valid where the context returns None or the prompt is too long.

        Nor are those behind a token that the teacher lacks; the metric `unreadable` is the share of samples with one.
        """
        prompts = self.prompts_of(samples)
        readable_part = None if self.weights.valid_ids is None else readable(samples, prompts, self.weights.valid_ids)
        if readable_part is not None:
            samples, prompts = readable_part.samples, readable_part.prompts
        completion_lengths = [len(sample.token_ids) - sample.prompt_length for sample in samples]
        window = self.student.window if self.source is None else self.source.window()
        limit = self.context.max_prompt_tokens or window
        # Prompts without attempts were checked before training; those from attempts may be too long for the teacher.
        from_attempts = self.context.needs_rollouts
        fits = [
            p is not None and (not from_attempts or len(p) <= min(window - n, limit))
            for p, n in zip(prompts, completion_lengths, strict=True)
        ]
        too_long = [p is not None and not fit for p, fit in zip(prompts, fits, strict=True)]
        # Without such samples one is read all the same: other devices may wait for this one's shard of the weights.
        rows = [b for b, fit in enumerate(fits) if fit] or [0]
        ids = {b: (prompts[b] if fits[b] else None) or samples[b].token_ids[: samples[b].prompt_length].tolist() for b in rows}
        totals = [len(ids[b]) + completion_lengths[b] for b in rows]
        plan = [[rows[i] for i in part] for part in plan_micro_batches(totals, max_tokens)]
        pad, device = self.renderer.tokenizer.pad_token_id, self.student.lm.device  # type: ignore[attr-defined]
        scores = self.weights.read([collate([samples[b] for b in part], pad, device, [ids[b] for b in part]) for part in plan])
        counts = [sample.trainable for sample in samples]
        hidden = scores.hidden.new_zeros(sum(counts), scores.hidden.shape[-1])
        hidden[torch.cat([packed_index(part, counts) for part in plan]).to(device)] = scores.hidden
        cost = Cost(sum(totals), self.weights.sizes().read(totals))
        metrics = {} if readable_part is None else {"unreadable": readable_part.cut.float().to(device)}
        valid = None if readable_part is None else readable_part.valid.to(device)
        if not from_attempts:
            return replace(scores, hidden=hidden, valid=valid, cost=cost, metrics=metrics)
        has_context, overlong = torch.tensor(fits, device=device), torch.tensor(too_long, device=device)
        if overlong.any() and not has_context.any():
            log.warning(
                "warning: every prompt of the teacher in this rollout is too long with its context, so nothing is "
                "learned from it; raise context.max_prompt_tokens, or lower rollout.sampling.max_new_tokens."
            )
        shown = torch.repeat_interleave(has_context, torch.tensor(counts, device=device))
        valid = shown if valid is None else shown & valid
        metrics |= {"valid": has_context.float(), "overlong": overlong.float()}
        return replace(scores, hidden=hidden, valid=valid, cost=cost, metrics=metrics)

    def prompts_of(self, samples: Sequence[Sample]) -> list[list[int] | None]:
        """The teacher's prompt for each sample; None where the context returns None."""
        attempts = self.attempts(samples) if self.context.needs_rollouts else [None] * len(samples)
        cache: dict[str, list[int]] = {}
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
            if key not in cache:
                cache[key] = self.rendering(chat).token_ids
            ids.append(cache[key])
        return ids

    def attempts(self, samples: Sequence[Sample]) -> list[Attempt | None]:
        """The judged completions; None for samples without a verdict."""
        texts = self.renderer.decode_all([sample.reply_ids for sample in samples])  # type: ignore[attr-defined]
        return [
            None if sample.verdict is None else Attempt(text, sample.verdict)
            for sample, text in zip(samples, texts, strict=True)
        ]

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
        return self.weights.footprint(start)

    def after_update(self) -> None:
        """Update the weights after an optimizer step."""
        self.weights.after_update()

    def state_dict(self) -> dict[str, Any]:
        """The state of the weights."""
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the weights."""
        self.weights.load_state_dict(state)


def external(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    context: NoContext | None = None,
    field: str = "teacher.path",
    base: str | None = None,
) -> LocalTeacher:
    """A teacher that is another model with the same tokenizer; see `weights.External`."""
    return LocalTeacher(External(path, dtype, attention, field, base), context)


def frozen(context: NoContext | None = None) -> LocalTeacher:
    """A teacher with the student's weights at the start of training."""
    return LocalTeacher(FrozenStart(), context)


def average(rate: float, every: int = 1, of: str = "effective", context: NoContext | None = None) -> LocalTeacher:
    """A teacher with a moving average of the student's weights; see `weights.Average`."""
    return LocalTeacher(Average(rate, every, of), context)


def trust_region(share: float, context: NoContext | None = None) -> LocalTeacher:
    """A teacher between the start and the student; see `weights.TrustRegion`."""
    return LocalTeacher(TrustRegion(share), context)


def live(context: NoContext | None = None) -> LocalTeacher:
    """A teacher with the student's current weights."""
    return LocalTeacher(Live(), context)
