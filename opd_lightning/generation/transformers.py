"""Decoding with transformers: token ids in, token ids out, nothing sampled from a distribution nobody asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: completions end there if EOS has not come.
        temperature: divides the logits; 0 is greedy.
        top_p, top_k: 1.0 and 0 leave the distribution whole.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature={self.temperature} must not be negative; 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p} must lie in (0, 1]; 1 leaves the distribution whole.")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k={self.top_k} must not be negative; 0 leaves the distribution whole.")

    def warpers(self) -> list[LogitsProcessor]:
        """The logits processors that make the sampling distribution, in transformers' order."""
        if self.temperature == 0:
            return []
        chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        chosen += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        return chosen + ([TopPLogitsWarper(self.top_p)] if self.top_p < 1 else [])


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


@dataclass(frozen=True)
class Completions:
    """What was written behind a batch of prompts.

    Attributes:
        ids [B, T]: right-padded, EOS included; lengths [B].
        truncated [B]: True where EOS did not come within the limit.
        logprobs [B, T]: under the sampling distribution, 0 beyond the lengths; None when greedy.
    """

    ids: Tensor
    lengths: Tensor
    truncated: Tensor
    logprobs: Tensor | None

    def rows(self) -> list[list[int]]:
        """The B completions as lists of ids, without padding."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The B completions as text without special tokens."""
        return tokenizer.batch_decode(self.rows(), skip_special_tokens=True)


def eos_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation config."""
    own = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    more = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({tokenizer.eos_token_id, *more})


@torch.no_grad()
def generate(
    lm: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, eos: Sequence[int], pad: int
) -> Completions:
    """Completions of a batch of prompts, drawn from torch's current random state.

    The model's own generation config is ignored: transformers would merge its top_k=50 and the like.
    """
    assert not lm.training, "generate in eval mode: with activation checkpointing, train mode decodes silent garbage"
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
    processors = LogitsProcessorList([] if greedy else [*sampling.warpers(), recorder])
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
        )
    finally:
        lm.generation_config = restore
    ids = out[:, longest:]
    is_eos = torch.isin(ids, torch.tensor(list(eos), device=device))
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, ids.shape[1])
    if greedy:
        return Completions(ids, lengths, ~ended, None)
    recorder.record(out[:, -1])
    inside = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Completions(ids, lengths, ~ended, torch.stack(recorder.columns, 1).masked_fill(~inside, 0.0))


def complete(
    lm: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> Completions:
    """`generate` with the ids that end and pad completions of this model and tokenizer."""
    return generate(lm, prompt_ids, sampling, eos_ids(lm, tokenizer), tokenizer.pad_token_id)
