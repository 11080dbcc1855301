"""The alignment of two tokenizations of one text by byte offsets, and the tokens that two vocabularies share.

A span reaches from one byte offset at which both tokenizations have a boundary to the next: spans are the shortest stretches of
text that are whole tokens in both. No model is needed.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from opd_lightning.data.token_bytes import Spelling, TokenBytes


@dataclass(frozen=True)
class Alignment:
    """The S spans of two tokenizations.

    Attributes:
        bounds [S + 1]: byte offsets of the spans.
        student, teacher [S + 1]: the first token of each span, and the number of tokens.
    """

    bounds: np.ndarray
    student: np.ndarray
    teacher: np.ndarray

    @property
    def single(self) -> np.ndarray:
        """Whether each span [S] is one token of both."""
        return (np.diff(self.student) == 1) & (np.diff(self.teacher) == 1)

    def up_to(self, n: int) -> "Alignment":
        """The spans of the teacher's first n tokens."""
        kept = max(int((self.teacher <= n).sum()), 1)
        return Alignment(self.bounds[:kept], self.student[:kept], self.teacher[:kept])


def align(student: np.ndarray, teacher: np.ndarray) -> Alignment:
    """The alignment of two tokenizations by the byte offsets [L] where their tokens end.

    Tokens that end before the last common offset and have no bytes belong to what follows; without tokens there are no spans.

    Raises:
        ValueError: they are of texts of different lengths.
    """
    if not len(student) or not len(teacher):
        return Alignment(*(np.zeros(1, dtype=np.int64) for _ in range(3)))
    if student[-1] != teacher[-1]:
        raise ValueError(f"the tokens cover {student[-1]} and {teacher[-1]} bytes, so they are not of one text.")
    common = np.intersect1d(student, teacher)
    bounds = np.concatenate([[0], common[common > 0]])
    return Alignment(bounds, *(first_tokens(ends, bounds) for ends in (student, teacher)))


def first_tokens(ends: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The first token that starts at each bound but the last, and the number of tokens."""
    starts = np.concatenate([[0], ends[:-1]])
    first = np.searchsorted(starts, bounds, side="left")
    first[-1] = len(ends)
    return first


def with_end(spelling: Spelling, end: bool) -> np.ndarray:
    """The ends of the tokens, with one for an end token, which counts as a byte behind the text."""
    return np.append(spelling.ends, len(spelling.text.encode()) + 1) if end else spelling.ends


def shared_tokens(student: TokenBytes, teacher: TokenBytes, ends: tuple[int, int] | None = None) -> tuple[list[int], list[int]]:
    """The ids [K] of the student's and the teacher's tokens that are the same bytes, in the order of the student's ids.

    Of several tokens of the same bytes, such as a letter and SentencePiece's token of its byte, the first are paired with the
    first. A special token is none of a text's tokens, whatever its name.

    Args:
        ends: the end tokens of both, which are a pair whatever their names are.
    """
    mine, theirs = by_spelling(student), by_spelling(teacher)
    pairs = {s: t for key, ids in mine.items() for s, t in zip(ids, theirs.get(key, ()), strict=False)}
    if ends is not None and pairs.get(ends[0]) != ends[1]:
        pairs = {s: t for s, t in pairs.items() if s != ends[0] and t != ends[1]} | {ends[0]: ends[1]}
    student_ids = sorted(pairs)
    return student_ids, [pairs[i] for i in student_ids]


def by_spelling(tokens: TokenBytes) -> dict[tuple[bytes, bool], list[int]]:
    """The ids of tokens by their bytes and whether they are special; those of byte fallback last."""
    found: dict[tuple[bytes, bool], list[int]] = defaultdict(list)
    for last in (False, True):
        for i, part in enumerate(tokens.table):
            if part and (i in tokens.fallback) is last:
                found[part, i in tokens.special].append(i)
    return found
