"""A model on a CPU: what torch computes slowly there by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from opd_lightning.models.float32_layers import fast_float32
from opd_lightning.models.short_attention import short_attention


@contextmanager
def fast_on_cpu(lm: PreTrainedModel) -> Iterator[None]:
    """A context in which a model runs faster on a CPU; the backward pass belongs into it too. GPUs see no change."""
    with fast_float32(lm), short_attention(lm):
        yield
