"""Splits: equal prompts are removed, and training prompts that nearly repeat held-out ones are counted."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from opd_lightning.types import Example

WORDS = 3
"""Words of a shingle."""

COMMON = 50
"""A shingle in more held-out prompts than this is common wording, and gives no candidates."""


def normal(text: str) -> str:
    """The text in lower case with single blanks, for comparison of prompts."""
    return " ".join(text.lower().split())


def other_fields(message: Mapping[str, Any]) -> list[Any]:
    """The fields of a turn beside role and content, such as tool calls."""
    fields = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [fields] if fields else []


def digest_of(example: Example) -> bytes:
    """A digest of the prompt's chat; equal prompts have equal digests."""
    return digest(f"[{', '.join(map(as_json, example.messages))}]")


def key_of(example: Example) -> str:
    """The digest of the prompt's chat as text."""
    return digest_of(example).hex()


def as_json(message: Mapping[str, Any]) -> str:
    """A turn as compared, in JSON: its role, its content up to case and blanks, and its other fields."""
    if len(message) == 2 and type(message["role"]) is str:  # the same text, in less time
        return f"[{quoted(message['role'])}, {quoted(normal(message['content']))}]"
    turn = [message["role"], normal(message["content"]), *other_fields(message)]
    return json.dumps(turn, sort_keys=True, default=str)


def digest(text: str) -> bytes:
    """A digest of 16 bytes."""
    return blake2b(text.encode(), digest_size=16).digest()


def position(key: str) -> float:
    """A number in [0, 1) from the prompt's key alone, which determines its split."""
    return int(key[:13], 16) / 16**13


def distinct(examples: Sequence[Example], without: Sequence[Example] = ()) -> list[Example]:
    """The examples with distinct prompts, in order, leaving out the prompts of `without`."""
    keys = {key_of(e) for e in without}
    kept = []
    for example in examples:
        key = key_of(example)
        if key not in keys:
            keys.add(key)
            kept.append(example)
    return kept


def shingles(example: Example) -> frozenset[str]:
    """All sequences of three words in the last turn."""
    words = re.findall(r"\w+|[^\w\s]", example.messages[-1]["content"].lower())
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


def near_duplicates(train: Sequence[Example], held: Sequence[Example], threshold: float = 0.8) -> list[tuple[str, str]]:
    """Training prompts that nearly repeat a held-out one: the Jaccard similarity of shingles is at least `threshold`.

    Returns:
        (training id, held-out id), one pair per training prompt.
    """
    heldout_shingles = [shingles(e) for e in held]
    index = defaultdict(list)
    for i, parts in enumerate(heldout_shingles):
        for part in parts:
            index[part].append(i)
    pairs = []
    for example in train:
        shingle_set = shingles(example)
        shared = Counter(i for part in shingle_set if len(index.get(part, ())) <= COMMON for i in index.get(part, ()))
        for i, _ in shared.most_common(5):
            if len(shingle_set & heldout_shingles[i]) / len(shingle_set | heldout_shingles[i]) >= threshold:
                pairs.append((example.id, held[i].id))
                break
    return pairs
