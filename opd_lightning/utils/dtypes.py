"""The dtype of numbers that are computed with, such as log-probabilities, rewards and weights."""

import torch


def real_dtype() -> torch.dtype:
    """The default dtype, at least float32: Lightning's bf16-true makes bfloat16 the default within a step."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)
