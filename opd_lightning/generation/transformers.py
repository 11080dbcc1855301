"""TransformersGenerator: the reference engine, on the student in memory."""

from collections.abc import Sequence
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
from opd_lightning.generation.batches import batch_support
from opd_lightning.types import Completion, Rendered, SamplingParams
from opd_lightning.utils.seeds import seeded
from opd_lightning.utils.vocabulary import ValidIds


class TransformersGenerator:
    """transformers' `generate` on the student in memory; it needs no copy of the weights.

    Args:
        tokenizer: the student's.
        renderer: has the tokens that end a reply. Those of the model's generation config end it too, unless the renderer has
            a chosen `end_token`; a teacher that writes keeps its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, renderer: Renderer | None = None):
        self.tokenizer, self.valid_ids = tokenizer, ValidIds.of(tokenizer.get_vocab())
        self.end_ids = [tokenizer.eos_token_id] if renderer is None else list(renderer.end_ids)
        self.end_chosen = getattr(renderer, "end_token", None) is not None
        self.student: Any = None
        self.version: int | None = None

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, model: Any = None) -> list[Completion]:
        """`sampling.n` completions per prompt, those of one prompt adjacent; see `Generator`."""
        ids = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
        with (self.student.eval_mode if model is None else model)() as lm, seeded(seed, lm.device):
            ends = self.end_ids if self.end_chosen and model is None else eos_ids(lm, self.end_ids)
            completions = decode(lm, ids, sampling, ends, self.tokenizer.pad_token_id, self.valid_ids)
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
        elif bool(torch.isnan(scores).any()) or bool((scores == torch.inf).any()):  # once per batch, at its first token
            raise ValueError(
                "the model's logits are NaN or infinite, so nothing can be drawn from them: its weights are broken. "
                "Go back to an earlier checkpoint, and lower optim.lr or optim.clip_norm."
            )
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
) -> list[Completion]:
    """One completion of each prompt, drawn from torch's current random state.

    The model's own generation config is ignored: transformers would merge its top_k=50 and others.

    Args:
        valid_ids: the ids that can be drawn; log-probabilities are those among them. None draws from all rows of the model's.
    """
    assert not lm.training, "generate in eval mode: with activation checkpointing, train mode decodes garbage without an error"
    if len(prompt_ids) > 1 and (kind := batch_support(lm, min(prompt_ids, key=len))) != "any":
        keys = [len(prompt) if kind == "equal" else b for b, prompt in enumerate(prompt_ids)]
        if len(set(keys)) > 1:
            return decode_apart(lm, prompt_ids, keys, sampling, eos, pad, valid_ids)
    device = lm.device
    longest = max(map(len, prompt_ids))
    left = torch.full((len(prompt_ids), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(left)
    for b, prompt in enumerate(prompt_ids):
        left[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask[b, longest - len(prompt) :] = 1
    greedy = sampling.temperature == 0
    recorder = _Recorder(longest)
    # Our own warpers come before the recorder, and the config keeps transformers from adding any behind it.
    processors = LogitsProcessorList([] if valid_ids is None else [OnlyValidIds(valid_ids)])
    processors += [] if greedy else [*warpers(sampling), recorder]
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
            input_ids=left.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=processors,
            synced_gpus=False,  # weights are gathered here; ranks may generate different numbers of tokens
        )
    finally:
        lm.generation_config = restore
    if not greedy:
        recorder.record(out[:, -1])
    columns = None if greedy else torch.stack(recorder.columns, 1).tolist()
    ends, completions = set(eos), []
    for b, row in enumerate(out[:, longest:].tolist()):
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        length = len(row) if stop is None else stop + 1
        logprobs = None if columns is None else columns[b][:length]
        completions.append(Completion(row[:length], "length" if stop is None else "stop", logprobs))
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
