"""Floating-point operations of a training step, from a model's sizes and the lengths of what it read and wrote.

Counted is what the matrix products of a dense transformer need, a multiplication and its addition being two operations: "model
FLOPs" as in PaLM (arXiv 2204.02311, appendix B), which a smaller micro-batch, recomputed activations or padding do not change.
With W weights in the layers' matrices, A = layers x heads x head width, and V x H weights in the output layer:

    reading a sequence of L tokens      2 W L + 4 A L^2        (attention without the saving that causality allows)
    logits of N positions               2 V H N
    writing T tokens behind a prompt of P, with a cache: reading P, then one token at a time behind t = P+1 .. P+T-1 others,
                                        2 W (P + T - 1) + 4 A (P^2 + sum t), and the logits of T positions
    backward of a reading               as much again for the activations, and for those weights that are trained

Left out: embeddings, norms, softmax, the loss and the optimizer. A mixture of experts is counted as if all worked. Where the
embedding is frozen, as with an adapter, the first layer's input gradient is counted though nobody needs it: some 5 % of the
backward pass of a model of three layers, less in deeper ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from opd_lightning.types import Sample


@dataclass(frozen=True)
class Sizes:
    """What decides a model's cost.

    Attributes:
        layers: weights in the matrices of the layers.
        attention: layers x heads x head width.
        head: weights of the output layer.
        trained: those of `layers` that are trained.
        trained_head: those of `head` that are trained.
    """

    layers: int
    attention: int
    head: int
    trained: int
    trained_head: int

    @classmethod
    def of(cls, lm: PreTrainedModel) -> "Sizes":
        """The sizes of a model of transformers."""
        tables = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        matrices = [p for p in lm.base_model.parameters() if p.dim() >= 2 and id(p) not in tables]
        config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layers=sum(p.numel() for p in matrices),
            attention=config.num_hidden_layers * heads * width,
            head=head.numel(),
            trained=sum(p.numel() for p in matrices if p.requires_grad),
            trained_head=head.numel() if head.requires_grad else 0,
        )

    def times(self, n: int) -> "Sizes":
        """The sizes of n such models that read the same."""
        return replace(self, layers=n * self.layers, attention=n * self.attention, head=n * self.head)

    def read(self, lengths: Iterable[int]) -> int:
        """One forward pass over sequences of these lengths, without logits."""
        return sum(2 * self.layers * n + 4 * self.attention * n**2 for n in lengths)

    def logits(self, positions: int) -> int:
        """The logits of so many positions."""
        return 2 * self.head * positions

    def write(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Decoding with a cache; a pair is the tokens of a prompt and of its completion."""
        total = 0
        for prompt, completion in pairs:
            keys = sum(range(prompt + 1, prompt + completion))
            total += self.read([prompt]) + 2 * self.layers * (completion - 1) + 4 * self.attention * keys
            total += self.logits(completion)
        return total

    def backward(self, lengths: Iterable[int], positions: int) -> int:
        """Gradients of `read` and `logits`."""
        layers = sum(2 * (self.layers + self.trained) * n + 8 * self.attention * n**2 for n in lengths)
        return layers + 2 * (self.head + self.trained_head) * positions


def rollout_flops(student: Sizes, samples: Sequence[Sample]) -> int:
    """What the student took to write its samples."""
    return student.write(
        [(sample.prompt_length, len(sample.completion_ids)) for sample in samples if sample.source == "student"]
    )


def update_flops(student: Sizes, samples: Sequence[Sample]) -> dict[str, int]:
    """One update on these samples: the student forward and backward."""
    lengths, positions = [len(sample.token_ids) for sample in samples], sum(sample.trainable for sample in samples)
    return {
        "forward": student.read(lengths) + student.logits(positions),
        "backward": student.backward(lengths, positions),
    }
