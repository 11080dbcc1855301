"""TransformersGenerator: the reference engine, on the student in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opd_lightning.contracts import Renderer
from opd_lightning.generation.batches import batch_support, cache_support
from opd_lightning.generation.decoding import PLAIN, Shortcuts, continued, padded
from opd_lightning.generation.probe import reading_gap
from opd_lightning.models.packed import packed
from opd_lightning.models.short_attention import short_attention
from opd_lightning.types import Completion, Rendered, SamplingParams
from opd_lightning.utils.seeds import seeded
from opd_lightning.utils.vocabulary import ValidIds


class TransformersGenerator:
    """transformers' `generate` on the student in memory; it needs no copy of the weights.

    Args:
        tokenizer: the student's.
        renderer: has the tokens that end a reply. Those of the model's generation config end it too, unless the renderer has
            a chosen `end_token`; a teacher that writes keeps its own.
        drop_finished: completions that have ended leave the batch.
        share_prefill: a prompt is read once for all of its completions.
        pack_weights: decode with copies of the weights that suit the processor; see `models.packed`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: Renderer | None = None,
        drop_finished: bool = True,
        share_prefill: bool = True,
        pack_weights: bool = True,
    ):
        self.tokenizer, self.valid_ids = tokenizer, ValidIds.of(tokenizer.get_vocab())
        self.end_ids = [tokenizer.eos_token_id] if renderer is None else list(renderer.end_ids)
        self.shortcuts, self.pack_weights = Shortcuts(drop_finished, share_prefill), pack_weights
        self.end_chosen = getattr(renderer, "end_token", None) is not None
        self.student: Any = None
        self.version: int | None = None
        self.metrics: dict[str, float] = {}

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, model: Any = None) -> list[Completion]:
        """`sampling.n` completions per prompt, those of one prompt adjacent; see `Generator`."""
        ids = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
        with (self.student.eval_mode if model is None else model)() as lm, seeded(seed, lm.device):
            ends = self.end_ids if self.end_chosen and model is None else eos_ids(lm, self.end_ids)
            pad = self.tokenizer.pad_token_id
            with suited(lm) if self.pack_weights else nullcontext():
                completions = decode(lm, ids, sampling, ends, pad, self.valid_ids, self.shortcuts)
            if model is None and sampling.temperature and torch.is_autocast_enabled(lm.device.type):
                processors = processors_of(sampling, self.valid_ids)
                self.metrics = {"generator/mismatch": reading_gap(lm, ids[0], completions[0], processors)}
        return (
            completions
            if model is not None
            else [replace(completion, policy_version=self.version) for completion in completions]
        )

    def update_weights(self, student: Any, version: int | None) -> None:
        """Set the student, whose weights are read in place."""
        self.student, self.version = student, version

    def close(self) -> None:
        """Nothing to release."""


@contextmanager
def suited(lm: PreTrainedModel) -> Iterator[None]:
    """A context in which a model decodes with what suits the processor."""
    with packed(lm), short_attention(lm):
        yield


def warpers(sampling: SamplingParams) -> list[LogitsProcessor]:
    """The logits processors of the sampling distribution, in transformers' order."""
    if sampling.temperature == 0:
        return []
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
    processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    return processors + ([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else [])


class OnlyValidIds(LogitsProcessor):
    """Sets the logits of ids without a token to -inf, and drops the padding rows behind the last one."""

    def __init__(self, valid_ids: ValidIds):
        self.valid_ids = valid_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.valid_ids.cut(scores)


class _Finite(LogitsProcessor):
    """Refuses logits that nothing can be drawn from, once per batch, at its first token."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.seen and (bool(torch.isnan(scores).any()) or bool((scores == torch.inf).any())):
            raise ValueError(
                "the model's logits are NaN or infinite, so nothing can be drawn from them: its weights are broken. "
                "Go back to an earlier checkpoint, and lower optim.lr or optim.clip_norm."
            )
        self.seen = True
        return scores


def processors_of(sampling: SamplingParams, valid_ids: ValidIds | None) -> LogitsProcessorList:
    """The logits processors that make the distribution that tokens are drawn from, or the logits of greedy decoding."""
    only = [] if valid_ids is None else [OnlyValidIds(valid_ids)]
    return LogitsProcessorList([*only, *warpers(sampling), *([] if sampling.temperature == 0 else [_Finite()])])


class _Recorder(LogitsProcessor):
    """Log-probability of each drawn token under the distribution it was drawn from.

    The token drawn from one call's scores is known at the next call, so one [B, V] is kept at a time, never [B, T, V].
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.scores: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.prompt_tokens:
            self.record(input_ids[:, -1])
        self.scores = scores.float()
        return scores

    def record(self, token: Tensor) -> None:
        assert self.scores is not None
        chosen = self.scores.gather(1, token[:, None]).squeeze(1)
        self.columns.append(chosen - self.scores.logsumexp(-1))


def eos_ids(lm: PreTrainedModel, end_ids: Sequence[int]) -> list[int]:
    """The ids that end a completion: those that end a reply, and those of the model's generation config."""
    model_ids = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    extra = [] if model_ids is None else [model_ids] if isinstance(model_ids, int) else list(model_ids)
    return sorted({*end_ids, *extra})


@torch.no_grad()
def decode(
    lm: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos: Sequence[int],
    pad: int,
    valid_ids: ValidIds | None = None,
    shortcuts: Shortcuts = PLAIN,
) -> list[Completion]:
    """One completion of each prompt, drawn from torch's current random state.

    The model's own generation config is ignored: transformers would merge its top_k=50 and others.

    Args:
        valid_ids: the ids that can be drawn; log-probabilities are those among them. None draws from all rows of the model's.
        shortcuts: work to leave out, where the model allows it.
    """
    assert not lm.training, "generate in eval mode: with activation checkpointing, train mode decodes garbage without an error"
    several, shortest = len(prompt_ids) > 1, min(prompt_ids, key=len)
    if several and (kind := batch_support(lm, shortest)) != "any":
        keys = [len(prompt) if kind == "equal" else b for b, prompt in enumerate(prompt_ids)]
        if len(set(keys)) > 1:
            return decode_apart(lm, prompt_ids, keys, sampling, eos, pad, valid_ids)
    elif several and shortcuts and cache_support(lm, shortest):
        greedy = sampling.temperature == 0
        processors = processors_of(sampling, valid_ids)
        most = sampling.max_new_tokens
        tokens, logprobs = continued(lm, prompt_ids, most, eos, pad, processors, greedy, shortcuts)
        return completions_of(tokens, logprobs, eos)
    return completions_of(*generated(lm, prompt_ids, sampling, eos, pad, valid_ids), eos)


def generated(
    lm: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos: Sequence[int],
    pad: int,
    valid_ids: ValidIds | None,
) -> tuple[Tensor, Tensor | None]:
    """Tokens and log-probabilities by transformers' `generate`, as `decoding.continued` returns them."""
    ids, mask = padded(prompt_ids, pad, lm.device)
    greedy = sampling.temperature == 0
    recorder = _Recorder(ids.shape[1])
    # Our own warpers come before the recorder, and the config keeps transformers from adding any behind it.
    processors = LogitsProcessorList([*processors_of(sampling, valid_ids), *([] if greedy else [recorder])])
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        eos_token_id=list(eos),
        pad_token_id=pad,
        use_cache=True,
    )
    restore, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        out = lm.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            synced_gpus=False,  # weights are gathered here; ranks may generate different numbers of tokens
        )
    finally:
        lm.generation_config = restore
    if greedy:
        return out[:, ids.shape[1] :], None
    recorder.record(out[:, -1])
    return out[:, ids.shape[1] :], torch.stack(recorder.columns, 1)


def completions_of(tokens: Tensor, logprobs: Tensor | None, eos: Sequence[int]) -> list[Completion]:
    """Completions up to their first end token, of tokens and log-probabilities [B, T]."""
    columns = None if logprobs is None else logprobs.tolist()
    ends, completions = set(eos), []
    for b, row in enumerate(tokens.tolist()):
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        length = len(row) if stop is None else stop + 1
        kept = None if columns is None else columns[b][:length]
        completions.append(Completion(row[:length], "length" if stop is None else "stop", kept))
    return completions


def decode_apart(
    lm: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampling: SamplingParams,
    eos: Sequence[int],
    pad: int,
    valid_ids: ValidIds | None = None,
) -> list[Completion]:
    """One completion of each prompt, generated for the prompts of one key at a time; see `batches`."""
    completions: dict[int, Completion] = {}
    for key in sorted(set(keys)):
        rows = [b for b, row_key in enumerate(keys) if row_key == key]
        completions |= zip(rows, decode(lm, [prompt_ids[b] for b in rows], sampling, eos, pad, valid_ids), strict=True)
    return [completions[b] for b in range(len(prompt_ids))]
