"""The first examples in the order of a split, selected while rows are read, so that others are not kept in memory."""

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

DIGEST = 16
"""Bytes of a prompt's digest, see `splits.digest_of`."""

SPARE = 4096
"""Entries beyond the wanted ones that are kept before the last of the order are dropped."""


class FirstExamples:
    """The entries of rows with distinct prompts that come first in the order of `splits.position`, and the number of all.

    Of each other row only the digest of its prompt is kept, so that files may be larger than memory: `add` every row, and
    `keep` an entry for those that may be selected.

    Args:
        most: number of entries to keep; None keeps all.
        without: digests of prompts that are left out.

    Attributes:
        read: number of rows so far.
    """

    def __init__(self, most: int | None, without: frozenset[bytes] | set[bytes] = frozenset()):
        self.most, self.without, self.read = most, without, 0
        self.digests = bytearray()
        self.entries: list[Any] = []
        self.numbers = array("q")  # of the entries' digests
        self.bound = b"\xff" * (DIGEST + 1)  # rows of this digest or a larger one are not selected

    def add(self, digest: bytes) -> bool:
        """Count a row by its prompt's digest; returns whether it may be selected, so that its entry is wanted."""
        self.read += 1
        if self.without and digest in self.without:
            return False
        self.digests += digest
        return digest < self.bound

    def keep(self, entry: Any) -> None:
        """Keep the entry of the row that was just added."""
        self.entries.append(entry)
        self.numbers.append(len(self.digests) // DIGEST - 1)
        if self.most is not None and len(self.entries) >= self.most + SPARE:
            self._drop()

    def number(self, digest: bytes) -> int:
        """The number that a row of this digest will have; -1 if its prompt is left out."""
        return -1 if digest in self.without else len(self.digests) // DIGEST

    def new_ones(self, numbers: Mapping[str, int]) -> set[str]:
        """The names of the numbers whose rows have a prompt that no row before them has."""
        new = set(first_of_each(self._numbers()).tolist()) if numbers else set()
        return {name for name, number in numbers.items() if number in new}

    def _drop(self) -> None:
        """Drop repeated prompts, and the entries behind the first `most`."""
        digests, order = self._ordered()
        if self.most is not None and len(order) > self.most:
            order = order[: self.most]
            last = int(digests[order[-1], 0]) >> 12 << 12  # equal positions keep the order of reading, so a later one loses
            self.bound = last.to_bytes(8, "big")
        kept = np.sort(order)
        self.entries = [self.entries[i] for i in kept]
        self.numbers = array("q", [self.numbers[i] for i in kept])

    def _ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """The entries' digests as pairs of numbers, and the indices of the first of each in the order of positions."""
        digests = self._numbers()[np.frombuffer(self.numbers, dtype=np.int64)]
        first = first_of_each(digests)
        return digests, first[np.argsort(digests[first, 0] >> np.uint64(12), kind="stable")]

    def _numbers(self) -> np.ndarray:
        """The digests of all rows, each as two numbers."""
        return np.frombuffer(bytes(self.digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)

    @property
    def distinct(self) -> int:
        """The number of distinct prompts."""
        return len(first_of_each(self._numbers()))

    def repeats(self, rows: str) -> list[str]:
        """A warning where more than a hundredth of the rows, which are called so, are left out for their prompts."""
        n = self.read - self.distinct
        if n <= self.read / 100:
            return []
        kept = "one row of each prompt is kept" + (", and none of a held-out prompt" if self.without else "")
        return [f"{n} of {self.read} {rows} repeat a prompt, up to case and blanks, and are left out: {kept}."]

    def check_left(self, path: str, heldout: str) -> None:
        """Raises ValueError if held-out rows leave too few for training and validation.

        Args:
            path, heldout: the options that name the rows and the held-out ones.
        """
        distinct = self.distinct
        if distinct == 0:
            raise ValueError(f"all {self.read} rows of {path} have prompts that {heldout} holds out; give it other rows.")
        if distinct == 1:
            raise ValueError(f"{path} has 1 distinct prompt beside those of {heldout}; training and validation need 2.")

    @property
    def keys(self) -> set[bytes]:
        """The digests of the distinct prompts."""
        return {bytes(self.digests[i : i + DIGEST]) for i in range(0, len(self.digests), DIGEST)}

    def parts(self, sizes: Iterable[int | None]) -> list[list[Any]]:
        """The entries in consecutive parts of these sizes (None: the rest), each in the order of reading."""
        _, ordered = self._ordered()
        if self.most is not None:
            ordered = ordered[: self.most]
        parts, begin = [], 0
        for size in sizes:
            end = len(ordered) if size is None else min(begin + size, len(ordered))
            parts.append([self.entries[i] for i in np.sort(ordered[begin:end])])
            begin = end
        return parts


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """The indices [m] of the first of all equal rows of digests [n, 2], ascending."""
    if not len(digests):
        return np.zeros(0, np.int64)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable
    ordered = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return np.sort(order[new])
