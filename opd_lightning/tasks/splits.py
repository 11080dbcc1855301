"""Training and held-out prompts apart: equal ones are removed, nearly equal ones are counted."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.types import Example

WORDS = 3
"""Words of a shingle."""

COMMON = 50
"""A shingle in more held-out prompts than this is wording, not content, and finds no candidates."""


def normal(text: str) -> str:
    """Lower case, single blanks: prompts that differ in nothing else are equal."""
    return " ".join(text.lower().split())


def beside(message: Mapping[str, Any]) -> list[Any]:
    """What a turn says beside its content, such as calls of tools."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [more] if more else []


def key_of(example: Example) -> str:
    """A digest of the chat that is shown; equal prompts have equal keys."""
    chat = [[m["role"], normal(m["content"]), *beside(m)] for m in example.messages]
    return hashlib.blake2b(json.dumps(chat, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def position(key: str) -> float:
    """A number in [0, 1) that depends on the prompt alone: which side of a split it falls on."""
    return int(key[:13], 16) / 16**13


def distinct(examples: Sequence[Example], without: Sequence[Example] = ()) -> list[Example]:
    """The examples with distinct prompts, in order, leaving out the prompts of `without`."""
    seen = {key_of(e) for e in without}
    kept = []
    for example in examples:
        key = key_of(example)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def shingles(example: Example) -> frozenset[str]:
    """Every run of three words of the last turn."""
    words = re.findall(r"\w+|[^\w\s]", example.messages[-1]["content"].lower())
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


def near_duplicates(train: Sequence[Example], held: Sequence[Example], threshold: float = 0.8) -> list[tuple[str, str]]:
    """Training prompts that nearly repeat a held-out one: Jaccard similarity of their shingles at least `threshold`.

    Returns:
        (training id, held-out id), one pair per training prompt.
    """
    theirs = [shingles(e) for e in held]
    index = defaultdict(list)
    for i, parts in enumerate(theirs):
        for part in parts:
            index[part].append(i)
    pairs = []
    for example in train:
        mine = shingles(example)
        shared = Counter(i for part in mine if len(index.get(part, ())) <= COMMON for i in index.get(part, ()))
        for i, _ in shared.most_common(5):
            if len(mine & theirs[i]) / len(mine | theirs[i]) >= threshold:
                pairs.append((example.id, held[i].id))
                break
    return pairs
