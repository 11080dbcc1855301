"""Helpers of rollouts: checks of options, and samples from completions."""

import torch

from opd_lightning.types import Completion, Example, Rendered, Sample
from opd_lightning.utils.dtypes import real_dtype


def check_options(num_generations: int, num_iterations: int, async_steps: int = 0) -> None:
    """Raises ValueError for options out of range."""
    if num_generations < 1:
        raise ValueError(f"rollout.num_generations={num_generations} must be at least 1.")
    if num_iterations < 1:
        raise ValueError(f"rollout.num_iterations={num_iterations} must be at least 1.")
    if async_steps < 0:
        raise ValueError(f"rollout.async_steps={async_steps} must not be negative; 0 writes each rollout when it is needed.")


def single_turn(
    example: Example, group: int, prompt: Rendered, completion: Completion, source: str, mask_truncated: bool
) -> Sample:
    """The sample of a prompt and its completion; with `mask_truncated` a truncated one is left out of the loss."""
    n = len(prompt.token_ids)
    logprobs = None if completion.logprobs is None else torch.tensor([0.0] * n + completion.logprobs, dtype=real_dtype())
    token_ids = torch.tensor([*prompt.token_ids, *completion.token_ids], dtype=torch.long)
    return Sample(
        example=example,
        group=group,
        token_ids=token_ids,
        loss_mask=torch.arange(len(token_ids)) >= n,
        prompt_length=n,
        source=source,  # type: ignore[arg-type]
        finish_reason=completion.finish_reason,
        logprobs=logprobs,
        policy_version=completion.policy_version,
        include_in_loss=not mask_truncated or completion.finish_reason != "length",
        model_inputs=prompt.model_inputs,
    )
