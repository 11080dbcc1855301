"""The backbone of a language model below its output layer, and the check that both together give the model's logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGE = 1000.0
"""The size of logits that reveals a cap; ordinary logits are below ten."""


def backbone(lm: PreTrainedModel) -> nn.Module:
    """The module that computes hidden states, also where `base_model_prefix` is wrong (Llama 4)."""
    if lm.base_model is not lm:
        return lm.base_model
    return next((child for child in lm.children() if isinstance(child, PreTrainedModel)), lm)


def soft_cap(config: Any) -> float | None:
    """The soft cap on a model's logits; None for no cap."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def scale(config: Any) -> float:
    """The factor on a model's logits: Cohere multiplies, Granite divides."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return factor / (getattr(config, "logits_scaling", None) or 1.0)


def verify_head(lm: PreTrainedModel, project: Callable[[Tensor], Tensor], name: str) -> None:
    """Check that backbone and head give the model's logits; some models transform logits in ways that `Head` lacks.

    Compared are the logits of four tokens, those of the first two alone, and those of the same hidden states scaled up until a
    cap is visible.

    Args:
        lm: in eval mode.
        project: the head: logits [n, V] of hidden states [n, H].
        name: the field, for errors.

    Raises:
        ValueError: the logits differ, also in what they rule out, or the model is no causal language model.
    """
    kind, ids = type(lm).__name__, torch.arange(4, device=lm.device)[None]
    try:
        hidden = backbone(lm)(input_ids=ids).last_hidden_state[0]
        causal = logits_agree(project(hidden[:2]), lm(input_ids=ids[:, :2]).logits[0])
        same = logits_agree(project(hidden), lm(input_ids=ids).logits[0])
        factor = max(1.0, LARGE / max(logit_range(project, hidden), 1e-6))
        with scaled(backbone(lm), factor) as calls:
            large_logits = lm(input_ids=ids).logits[0]
        same = same and (not calls or logits_agree(project(hidden * factor), large_logits))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name}: {kind} cannot be read as a causal language model ({first}); choose another model."
        ) from error
    if same and not causal:
        raise ValueError(
            f"{name}: {kind} reads the tokens behind a position too, so it would see what it is to predict; choose a causal "
            "model (config.json may set is_decoder or use_bidirectional_attention)."
        )
    if not same:
        raise ValueError(
            f"{name}: {kind} changes its hidden states or logits around the output layer in a way that "
            "losses do not reproduce; choose another model."
        )


def logit_range(project: Callable[[Tensor], Tensor], hidden: Tensor) -> float:
    """The largest logit of these hidden states without a cap, extrapolated from small ones."""
    small = 1e-3
    moved = (project(hidden * small) - project(hidden * 0.0)).float() / small
    return float(moved[torch.isfinite(moved)].abs().max()) if torch.isfinite(moved).any() else LARGE


def logits_agree(logits: Tensor, expected: Tensor) -> bool:
    """Whether two sets of logits agree up to rounding, where both are finite, and the first rules out what is expected."""
    if (torch.isneginf(expected) & torch.isfinite(logits)).any():
        return False
    finite = torch.isfinite(logits) & torch.isfinite(expected)
    if not finite.any():
        return True
    logits, expected = logits[finite].float(), expected[finite].float()
    return bool((logits - expected).abs().max() <= 0.05 * expected.abs().max().clamp_min(1.0))


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[list[bool]]:
    """A context in which a backbone's last hidden states are multiplied; the list is empty until it is called."""
    calls: list[bool] = []

    def hook(_, inputs, output):
        output.last_hidden_state = output.last_hidden_state * factor
        calls.append(True)
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()
