"""Prompts: a pure function of (seed, position), independent of the number of ranks and of interruptions."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Sampler

from opd_lightning.contracts import Renderer
from opd_lightning.types import Example, Prompts
from opd_lightning.utils.seeds import derive_seed


class PromptStream(Sampler[list[int]]):
    """Endless batches of example indices: position p is entry p mod n of the shuffle of epoch p div n.

    Args:
        n: number of examples.
        batch_size: prompts per rollout over all ranks.
        seed: seed of the shuffles.
        rank, world_size: this process takes every world_size-th prompt of a batch.
        start: rollouts already done, so that a resumed run continues with the next prompt.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        if n == 0:
            raise ValueError("the task has no training examples; check the task's options.")
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} cannot be shared by {world_size} devices; make it a multiple of {world_size}."
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(derive_seed(self.seed, "prompts", epoch)).permutation(self.n)

    def index(self, position: int) -> int:
        """The example at a position of the stream."""
        return int(self._order(position // self.n)[position % self.n])

    def batch(self, number: int) -> list[int]:
        """This process's examples of a rollout, counted from 0."""
        first = number * self.batch_size
        return [self.index(p) for p in range(first + self.rank, first + self.batch_size, self.world_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, count(self.start))


class PromptData(L.LightningDataModule):
    """The data module that passes `Prompts` to `training_step`.

    Args:
        examples: the task's training examples.
        renderer: the student's.
        batch_size: prompts per rollout over all devices.
        seed: seed of the order of prompts.
        num_iterations: optimizer steps per batch, to compute the batches that a restored run has consumed.
    """

    def __init__(self, examples: Sequence[Example], renderer: Renderer, batch_size: int, seed: int, num_iterations: int = 1):
        super().__init__()
        self.examples, self.renderer, self.batch_size, self.seed = examples, renderer, batch_size, seed
        self.num_iterations = num_iterations

    def stream(self) -> PromptStream:
        """This process's batches, from the trainer's current step on."""
        assert self.trainer is not None
        return PromptStream(
            n=len(self.examples),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=self.trainer.global_step // self.num_iterations,
        )

    def train_dataloader(self) -> DataLoader:
        # Lightning has restored global_step; the position in the stream follows from it.
        stream = self.stream()
        return DataLoader(range(len(self.examples)), batch_sampler=stream, collate_fn=self.collate)  # type: ignore[arg-type]

    def prompts(self, number: int) -> Prompts:
        """This process's prompts of a rollout, counted from 0, which the data loader gives in its turn."""
        return self.collate(self.stream().batch(number))

    def collate(self, indices: list[int]) -> Prompts:
        """Render and tokenize the examples of one batch."""
        examples = [self.examples[i] for i in indices]
        return Prompts(examples, [self.renderer.render(example.messages, example.tools) for example in examples])
