"""The part of a language model below its output layer, and whether both together are the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGE = 1000.0
"""Logits of this size show a cap that ordinary ones, below ten, do not reach."""


def backbone(lm: PreTrainedModel) -> nn.Module:
    """What makes hidden states; some models name it otherwise than they say (Llama 4)."""
    if lm.base_model is not lm:
        return lm.base_model
    return next((child for child in lm.children() if isinstance(child, PreTrainedModel)), lm)


def soft_cap(config: Any) -> float | None:
    """The cap on a model's logits; None caps nothing."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def scale(config: Any) -> float:
    """What a model multiplies its logits by: Cohere multiplies, Granite divides."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return factor / (getattr(config, "logits_scaling", None) or 1.0)


def verify_head(lm: PreTrainedModel, project: Callable[[Tensor], Tensor], name: str) -> None:
    """Make sure that backbone and head together are the model; some do to their logits what `Head` does not know.

    Compared are the logits of four tokens as they are, and those of the same hidden states made so large that a cap shows.

    Args:
        lm: in eval mode.
        project: the head: logits [n, V] of hidden states [n, H].
        name: the field to blame.

    Raises:
        ValueError: they are not, or the model cannot be read as one.
    """
    kind, ids = type(lm).__name__, torch.arange(4, device=lm.device)[None]
    try:
        hidden = backbone(lm)(input_ids=ids).last_hidden_state[0]
        same = close(project(hidden), lm(input_ids=ids).logits[0])
        factor = max(1.0, LARGE / max(reach(project, hidden), 1e-6))
        with scaled(backbone(lm), factor) as reached:
            large = lm(input_ids=ids).logits[0]
        same = same and (not reached or close(project(hidden * factor), large))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name}: {kind} cannot be read as a causal language model ({first}); choose another model."
        ) from error
    if not same:
        raise ValueError(
            f"{name}: {kind} changes its hidden states or logits around the output layer in a way that "
            "losses do not reproduce; choose another model."
        )


def reach(project: Callable[[Tensor], Tensor], hidden: Tensor) -> float:
    """How far these hidden states would move logits without a cap, which small ones do not feel."""
    small = 1e-3
    moved = (project(hidden * small) - project(hidden * 0.0)).float() / small
    return float(moved[torch.isfinite(moved)].abs().max()) if torch.isfinite(moved).any() else LARGE


def close(found: Tensor, expected: Tensor) -> bool:
    """Do two sets of logits agree but for rounding, where they are finite? Broken weights are a fault of another kind."""
    known = torch.isfinite(found) & torch.isfinite(expected)
    if not known.any():
        return True
    found, expected = found[known].float(), expected[known].float()
    return bool((found - expected).abs().max() <= 0.05 * expected.abs().max().clamp_min(1.0))


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[list[bool]]:
    """A backbone whose last hidden states are multiplied; the list says whether it was called."""
    reached: list[bool] = []

    def hook(_, inputs, output):
        output.last_hidden_state = output.last_hidden_state * factor
        reached.append(True)
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield reached
    finally:
        handle.remove()
