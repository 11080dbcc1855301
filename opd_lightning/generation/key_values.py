"""Keys and values of decoding, in buffers with room for tokens to come."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 128
"""Tokens that a full buffer grows by, at least; it also grows by a quarter of its length."""


class GrowingLayer(DynamicLayer):
    """A layer's keys and values [B, heads, L, width]: a step writes its own token, where `DynamicLayer` copies all of them."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the keys and values of all."""
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if before == 0:  # the prompt, which may be repeated next
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        assert self.keys is not None and self.values is not None
        if self.buffers is None or self.buffers[0].shape[-2] < after:
            length = after + max(ROOM, after // 4)
            self.buffers = grown(self.keys, length), grown(self.values, length)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., before:after, :] = states
        self.keys, self.values = (buffer[..., :after, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.buffers = None


def grown(states: Tensor, length: int) -> Tensor:
    """A buffer of this length that begins with the states."""
    buffer = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model, with growing layers where it attends to all tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def is_plain(cache: DynamicCache) -> bool:
    """Whether a cache holds nothing but keys and values, of a window or of all tokens."""
    return all(type(layer) in (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
