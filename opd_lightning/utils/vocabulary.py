"""Vocabularies: the ids of an output layer that are tokens of the tokenizer (valid ids), and those that two models share.

Output layers are padded: Qwen has 151,936 rows for 151,669 tokens. The rows behind the last token are neither sampled nor
compared. Models of one family differ in a few added tokens (chat and base, Qwen2.5 and Qwen3): they are compared on the ids
that mean the same token in both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValidIds:
    """The ids of a tokenizer's tokens: the first `size` without those in `absent`."""

    size: int
    absent: tuple[int, ...] = ()

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> "ValidIds":
        """The valid ids of a tokenizer, from its ids by token; ids below the last one without a token are absent."""
        ids = set(vocabulary.values())
        size = max(ids, default=-1) + 1
        return cls(size, tuple(i for i in range(size) if i not in ids) if len(ids) < size else ())

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.size - len(self.absent)

    def intersection(self, others: Iterable["ValidIds"]) -> "ValidIds":
        """The ids that these and all `others` have."""
        every = [self, *others]
        size = min(ids.size for ids in every)
        return ValidIds(size, tuple(sorted({i for ids in every for i in ids.absent if i < size})))

    def covers(self, other: "ValidIds") -> bool:
        """Whether every id of another is among these."""
        return self.size >= other.size and set(self.absent) <= set(other.absent)

    def contains(self, ids: Tensor) -> Tensor:
        """Whether each id is valid: bools in the shape of `ids`."""
        inside = ids < self.size
        return inside & ~torch.isin(ids, ids.new_tensor(self.absent)) if self.absent else inside

    def cut(self, scores: Tensor) -> Tensor:
        """Scores [n, V] cut to these ids, [n, size]; absent ids get -inf, in a copy."""
        part = scores if scores.shape[-1] == self.size else scores[..., : self.size]
        return part.index_fill(-1, self.index(part.device), -torch.inf) if self.absent else part

    def index(self, device: torch.device) -> Tensor:
        """The absent ids as a tensor."""
        return torch.tensor(self.absent, dtype=torch.long, device=device)


def valid_ids_of(scores: Any) -> ValidIds:
    """The ids that a teacher's scores cover."""
    return ValidIds(scores.vocabulary, tuple(getattr(scores, "absent", ())))


@dataclass(frozen=True)
class Overlap:
    """The comparison of the student's and the teacher's vocabulary.

    Attributes:
        shared: the ids that mean the same token in both.
        student_only, teacher_only: tokens that only one of them has.
        conflicts: (id, student's token, teacher's token) where these differ, in order of ids.
    """

    shared: ValidIds
    student_only: tuple[str, ...]
    teacher_only: tuple[str, ...]
    conflicts: tuple[tuple[int, str, str], ...]

    @property
    def same(self) -> bool:
        """Whether there is no difference."""
        return not (self.student_only or self.teacher_only or self.conflicts)

    def describe(self, student: str = "the student", teacher: str = "the teacher") -> str:
        """The tokens that are left out of a comparison, as text; empty if none are."""
        parts = [
            f"{len(tokens)} token{'s' * (len(tokens) > 1)} that only {name} has ({', '.join(map(repr, tokens[:4]))}"
            f"{', ...' if len(tokens) > 4 else ''})"
            for name, tokens in ((student, self.student_only), (teacher, self.teacher_only))
            if tokens
        ]
        return " and ".join(parts)


def overlap(student: Mapping[str, int], teacher: Mapping[str, int]) -> Overlap:
    """The comparison of the student's and the teacher's tokenizer, from their ids by token."""
    if student == teacher:
        return Overlap(ValidIds.of(student), (), (), ())
    student_tokens, teacher_tokens = ({i: token for token, i in ids.items()} for ids in (student, teacher))
    common = student_tokens.keys() & teacher_tokens.keys()
    conflicts = tuple(
        (i, student_tokens[i], teacher_tokens[i]) for i in sorted(common) if student_tokens[i] != teacher_tokens[i]
    )
    shared = ValidIds.of({student_tokens[i]: i for i in common if student_tokens[i] == teacher_tokens[i]})
    student_only, teacher_only = (
        tuple(tokens[i] for i in sorted(tokens.keys() - common)) for tokens in (student_tokens, teacher_tokens)
    )
    return Overlap(shared, student_only, teacher_only, conflicts)


def differences(comparison: Overlap, n: int = 3) -> str:
    """The first ids that mean different tokens, as text."""
    shown = ", ".join(f"{i} is {a!r} for the student and {b!r} for the teacher" for i, a, b in comparison.conflicts[:n])
    count = len(comparison.conflicts)
    return f"{count} {'id means' if count == 1 else 'ids mean'} different tokens, such as {shown}"
