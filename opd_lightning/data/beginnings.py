"""Beginnings: which tokens of two vocabularies are counted as one outcome, because they begin the same text.

Both models say what the next text is, each by a token of its own. A token that the other side lacks stands for a text that the
other would begin with its own first token for these bytes: where the student has `a` and `b` and the teacher `ab` too, both say
"the text begins with a". So a token belongs with the other tokenizer's first token of its bytes, and with what that one belongs
with in turn, until a token is reached that both have. On text that each tokenizer writes in its own way, the events of both are
then the same, as long as what follows does not change how the token's bytes are divided.
"""

from collections.abc import Sequence

import numpy as np

from opd_lightning.data.alignment import by_spelling
from opd_lightning.data.chat_template import ANCHORS
from opd_lightning.data.token_bytes import TokenBytes

BATCH = 20_000
"""Tokens that are tokenized at a time."""


def token_classes(
    student: TokenBytes, teacher: TokenBytes, pairs: tuple[Sequence[int], Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The class of each id of the student's and of the teacher's; what has no counterpart is alone in its class.

    Args:
        pairs: the ids of tokens that are the same bytes in both.
    """
    size = len(student.table)
    parent = np.arange(size + len(teacher.table))
    shared = [np.array(ids, dtype=np.int64) for ids in pairs]
    parent[size + shared[1]] = shared[0]
    for (own, other), paired, (base, there) in zip(
        ((student, teacher), (teacher, student)), (shared, shared[::-1]), ((0, size), (size, 0)), strict=True
    ):
        alone = np.setdiff1d(np.arange(len(own.table)), paired[0])
        first = first_tokens(own, alone, other, frozenset(paired[1].tolist()))
        found = first >= 0
        parent[base + alone[found]] = there + first[found]
    while not np.array_equal(parent, above := parent[parent]):
        parent = above
    return parent[:size], parent[size:]


def first_tokens(own: TokenBytes, ids: np.ndarray, other: TokenBytes, paired: frozenset[int]) -> np.ndarray:
    """The other tokenizer's first token of each token's bytes; -1 for special ones, and what it cannot write.

    Of bytes that are no text it is the longest of the other's tokens that they begin with.

    Args:
        paired: the other's ids that both have; another one is shorter than the token.
    """
    found = np.full(len(ids), -1, dtype=np.int64)
    texts: dict[int, str] = {}
    longest = {key[0]: same[0] for key, same in by_spelling(other).items() if not key[1]}
    for row, i in enumerate(ids.tolist()):
        data = own.table[i]
        if not data or i in own.special:
            continue
        try:
            texts[row] = data.decode()
        except UnicodeDecodeError:
            found[row] = next((longest[data[:n]] for n in range(len(data), 0, -1) if data[:n] in longest), -1)
    for anchor in (*ANCHORS, ""):
        rows = list(texts)
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            for row, first in zip(part, first_of(other, anchor, [texts[row] for row in part]), strict=True):
                if first >= 0:
                    found[row] = first
                    del texts[row]
    for row, first in enumerate(found.tolist()):  # so that every step is to a shorter token, or the last
        if first >= 0 and first not in paired and len(other.table[first] or b"") >= len(own.table[ids[row]] or b""):
            found[row] = -1
    return found


def first_of(tokens: TokenBytes, anchor: str, texts: list[str]) -> list[int]:
    """The first token of each text behind an anchor; -1 where it is not the text's beginning, or merges with the anchor."""
    head = tokens.encoded(anchor)[0] if anchor else []
    found = []
    for text, encoded in zip(texts, tokens.encoded_batch([anchor + text for text in texts]), strict=True):
        own = encoded[len(head) :] if encoded[: len(head)] == head else []
        first = next((i for i in own if tokens.table[i] != b""), -1)
        data = tokens.table[first] if first >= 0 else None
        found.append(first if data and text.encode().startswith(data) else -1)
    return found
