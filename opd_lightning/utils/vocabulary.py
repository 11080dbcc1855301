"""Vocabularies: which ids of an output layer are words, and which of them two models share.

Output layers are padded: Qwen has 151,936 rows for 151,669 words. What stands behind the last word is no word, so it is neither
sampled nor compared. Siblings of one family differ in a few added tokens (chat and base, Qwen2.5 and Qwen3): they are compared
on the ids that mean the same token for both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Words:
    """The ids that are words: the first `size` without those in `absent`."""

    size: int
    absent: tuple[int, ...] = ()

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> "Words":
        """Those of a tokenizer's ids by token; ids below the last one that no token has are absent."""
        ids = set(vocabulary.values())
        size = max(ids, default=-1) + 1
        return cls(size, tuple(i for i in range(size) if i not in ids) if len(ids) < size else ())

    @property
    def count(self) -> int:
        """Number of words."""
        return self.size - len(self.absent)

    def meet(self, others: Iterable["Words"]) -> "Words":
        """The ids that all of them have."""
        every = [self, *others]
        size = min(words.size for words in every)
        return Words(size, tuple(sorted({i for words in every for i in words.absent if i < size})))

    def covers(self, other: "Words") -> bool:
        """Has it every word of another?"""
        return self.size >= other.size and set(self.absent) <= set(other.absent)

    def known(self, ids: Tensor) -> Tensor:
        """Which ids are words, a bool for each."""
        inside = ids < self.size
        return inside & ~torch.isin(ids, ids.new_tensor(self.absent)) if self.absent else inside

    def cut(self, scores: Tensor) -> Tensor:
        """Scores [n, V] of these words alone, [n, size]; the absent ones in between get -inf, in a copy."""
        part = scores if scores.shape[-1] == self.size else scores[..., : self.size]
        return part.index_fill(-1, self.index(part.device), -torch.inf) if self.absent else part

    def index(self, device: torch.device) -> Tensor:
        """The absent ids as a tensor."""
        return torch.tensor(self.absent, dtype=torch.long, device=device)


def words_of(scores: Any) -> Words:
    """The ids that a teacher's scores are about."""
    return Words(scores.vocabulary, tuple(getattr(scores, "absent", ())))


@dataclass(frozen=True)
class Overlap:
    """Two vocabularies side by side.

    Attributes:
        shared: the ids that mean the same token in both.
        mine, theirs: tokens that only one of them has.
        unlike: ids with one token here and another there: (id, mine, theirs), the first ids first.
    """

    shared: Words
    mine: tuple[str, ...]
    theirs: tuple[str, ...]
    unlike: tuple[tuple[int, str, str], ...]

    @property
    def same(self) -> bool:
        """Is there no difference?"""
        return not (self.mine or self.theirs or self.unlike)

    def describe(self, mine: str = "the student", theirs: str = "the teacher") -> str:
        """What is left out of a comparison, in words; empty if nothing is."""
        parts = [
            f"{len(tokens)} token{'s' * (len(tokens) > 1)} that only {name} has ({', '.join(map(repr, tokens[:4]))}"
            f"{', ...' if len(tokens) > 4 else ''})"
            for name, tokens in ((mine, self.mine), (theirs, self.theirs))
            if tokens
        ]
        return " and ".join(parts)


def overlap(mine: Mapping[str, int], theirs: Mapping[str, int]) -> Overlap:
    """Compare two tokenizers' ids by token."""
    if mine == theirs:
        return Overlap(Words.of(mine), (), (), ())
    here, there = ({i: token for token, i in ids.items()} for ids in (mine, theirs))
    both = here.keys() & there.keys()
    unlike = tuple((i, here[i], there[i]) for i in sorted(both) if here[i] != there[i])
    shared = Words.of({here[i]: i for i in both if here[i] == there[i]})
    mine_alone, theirs_alone = (tuple(one[i] for i in sorted(one.keys() - both)) for one in (here, there))
    return Overlap(shared, mine_alone, theirs_alone, unlike)


def differences(found: Overlap, n: int = 3) -> str:
    """The first ids that mean different tokens, in words."""
    shown = ", ".join(f"{i} is {a!r} for the student and {b!r} for the teacher" for i, a, b in found.unlike[:n])
    return f"{len(found.unlike)} ids mean different tokens, such as {shown}"
