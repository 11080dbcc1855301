"""The first examples in the order of a split, selected while rows are read, so that others are not kept in memory."""

import heapq
from collections.abc import Iterable

from opd_lightning.tasks.splits import key_of, position
from opd_lightning.types import Example


class FirstExamples:
    """The examples with distinct prompts that come first in the order of `splits.position`, and the number of all.

    Of each other example only 16 bytes are kept, so that files may be larger than memory.

    Args:
        most: number of examples to keep; None keeps all.
        without: digests of prompts that are left out.

    Attributes:
        read, distinct: numbers of examples so far, and of distinct prompts among them.
        keys: digests of the distinct prompts.
    """

    def __init__(self, most: int | None, without: frozenset[bytes] | set[bytes] = frozenset()):
        self.most, self.without = most, without
        self.read, self.keys = 0, set[bytes]()
        self.heap: list[tuple[float, int, Example]] = []

    @property
    def distinct(self) -> int:
        """The number of distinct prompts."""
        return len(self.keys)

    def add(self, example: Example) -> bool:
        """Add an example; returns whether its prompt is new."""
        self.read += 1
        key = key_of(example)
        digest = bytes.fromhex(key)
        if digest in self.keys or digest in self.without:
            return False
        self.keys.add(digest)
        entry = (-position(key), -self.read, example)  # a heap's first is its smallest; equal positions keep their order
        if self.most is None or len(self.heap) < self.most:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heappushpop(self.heap, entry)
        return True

    def parts(self, sizes: Iterable[int | None]) -> list[list[Example]]:
        """The examples in consecutive parts of these sizes (None: the rest), each in the order of reading."""
        ordered = sorted(self.heap, key=lambda entry: (-entry[0], -entry[1]))
        parts, begin = [], 0
        for size in sizes:
            end = len(ordered) if size is None else min(begin + size, len(ordered))
            parts.append([example for _, _, example in sorted(ordered[begin:end], key=lambda entry: -entry[1])])
            begin = end
        return parts
