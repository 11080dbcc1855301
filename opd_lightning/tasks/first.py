"""The first examples in the order of a split, while rows are read: what is not chosen is not kept."""

import heapq
from collections.abc import Iterable

from opd_lightning.tasks.splits import key_of, position
from opd_lightning.types import Example


class First:
    """Examples with distinct prompts: how many there are, and those that come first in `splits.position`'s order.

    Of all others 16 bytes each stay, so that the file may be longer than memory is large.

    Args:
        most: how many are kept; None keeps all.
        without: keys of prompts that are left out.

    Attributes:
        read, distinct: examples so far, and distinct prompts among them.
        keys: of the distinct prompts.
    """

    def __init__(self, most: int | None, without: frozenset[bytes] | set[bytes] = frozenset()):
        self.most, self.without = most, without
        self.read, self.keys = 0, set[bytes]()
        self.heap: list[tuple[float, int, Example]] = []

    @property
    def distinct(self) -> int:
        """How many prompts there are."""
        return len(self.keys)

    def add(self, example: Example) -> bool:
        """Take an example in; returns whether its prompt is a new one."""
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
        """So many from the front, then so many of the others, and so on (None: all of them); each as they stood."""
        ordered = sorted(self.heap, key=lambda entry: (-entry[0], -entry[1]))
        found, begin = [], 0
        for size in sizes:
            end = len(ordered) if size is None else min(begin + size, len(ordered))
            found.append([example for _, _, example in sorted(ordered[begin:end], key=lambda entry: -entry[1])])
            begin = end
        return found
