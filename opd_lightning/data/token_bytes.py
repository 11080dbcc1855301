"""The bytes of tokens: which bytes of a text each token of a sequence covers, for any fast tokenizer.

Tokens are spelled by the byte alphabet (byte-level BPE), by pieces with byte fallback (SentencePiece), or piece by piece by the
tokenizer's decoder (WordPiece and others). What the tokens of a sequence spell is compared with its text. Where it differs,
because a normaliser changed the text or blanks were dropped, the tokenizer's character offsets are taken instead, or the texts
of the sequence's beginnings. In every case the spans of the tokens, one after another, are the text's bytes.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.chat_template import ANCHORS, special_ids

FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A SentencePiece token of a single byte."""
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Spelling:
    """The tokens of a text. Token i covers the bytes from `ends[i - 1]` (0 for the first) to `ends[i]`.

    Attributes:
        ids: L of them.
        text: what they spell.
        ends [L]: not decreasing; the last is the number of the text's bytes. A token of no bytes belongs to what is behind it.
        exact [L]: whether the token is the bytes that it covers. Of any tokens, those that are no UTF-8 are not; of a
            tokenizer's own also those whose text a normaliser changed, or that have a blank before it.
    """

    ids: list[int]
    text: str
    ends: np.ndarray
    exact: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """The first byte of each token [L]."""
        return np.concatenate([np.zeros(min(1, len(self.ends)), dtype=np.int64), self.ends[:-1]])


class TokenBytes:
    """The bytes of each token of a tokenizer.

    Attributes:
        table: the bytes of each id behind other text; None for ids without a token, and where they depend on the tokens around.
        special: ids of special tokens, whose bytes are their names.

    Raises:
        ValueError: the tokenizer is none of the library `tokenizers`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} is written in Python and tells no offsets, which teacher.alignment "
                "needs; save it with a tokenizer.json."
            )
        self.tokenizer, self.backend = tokenizer, backend
        kinds = decoder_kinds(backend)
        added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        vocabulary = tokenizer.get_vocab()
        self.special = frozenset(special_ids(tokenizer))
        self.table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        self.fallback: set[int] = set()
        alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        for piece, i in vocabulary.items():
            match = FALLBACK.fullmatch(piece) if "ByteFallback" in kinds else None
            if i in added:
                self.table[i] = added[i].encode()
            elif alphabet is not None:
                known = all(character in alphabet for character in piece)
                self.table[i] = bytes(alphabet[character] for character in piece) if known else piece.encode()
            elif match is not None:
                self.table[i] = bytes([int(match[1], 16)])
                self.fallback.add(i)
            else:
                self.table[i] = self.behind_other_text(piece)

    def behind_other_text(self, piece: str) -> bytes | None:
        """The bytes that the decoder writes for a piece that follows another."""
        decoder = self.backend.decoder
        text = f"a {piece}" if decoder is None else decoder.decode(["a", piece])
        behind = text.removeprefix("a")
        return None if REPLACEMENT in behind or not text.startswith("a") else behind.encode()

    def spell(self, ids: list[int]) -> Spelling:
        """The tokens of a sequence that need not be the tokenizer's own choice, such as a model's samples."""
        text = self.backend.decode(ids, skip_special_tokens=False)
        parts = [self.table[i] for i in ids]
        if all(part is not None for part in parts):
            known: list[bytes] = parts  # type: ignore[assignment]
            raw = b"".join(known)
            for blank in (0, 1) if raw.startswith(b" ") else (0,):
                if raw[blank:].decode("utf-8", "replace") == text:
                    return by_bytes(ids, known, blank)
        return self.by_beginnings(ids, text)

    def by_beginnings(self, ids: list[int], text: str) -> Spelling:
        """The tokens by the texts of the sequence's beginnings; where one is no beginning of the text, the token has no end."""
        ends = np.zeros(len(ids), dtype=np.int64)
        beginnings = self.backend.decode_batch([ids[: i + 1] for i in range(len(ids))], skip_special_tokens=False)
        for i, beginning in enumerate(beginnings):
            if text.startswith(beginning) and not beginning.endswith(REPLACEMENT):
                ends[i] = len(beginning.encode())
        data = text.encode()
        ends = np.maximum.accumulate(ends)
        ends[-1:] = len(data)
        ends = inside_characters(ends, [self.table[i] for i in ids], data)
        starts = np.concatenate([[0], ends[:-1]])
        exact = [REPLACEMENT.encode() not in data[start:end] for start, end in zip(starts, ends, strict=True)]
        return Spelling(list(ids), text, ends, np.array(exact, dtype=bool))

    def encode(self, text: str) -> Spelling:
        """The tokenizer's own tokens of a text that continues another; special tokens in it are tokenized as text."""
        ids, offsets = self.continuation(text)
        data, parts = text.encode(), [self.table[i] for i in ids]
        if all(part is not None for part in parts):
            known: list[bytes] = parts  # type: ignore[assignment]
            raw = b"".join(known)
            for blank in (0, 1):
                if raw == b" " * blank + data:
                    spelling = by_bytes(ids, known, blank)
                    assert spelling.text == text, "the bytes of the tokens are those of the text"
                    spelling.exact[:blank] = False
                    return spelling
        return self.by_offsets(ids, offsets, text)

    def by_offsets(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> Spelling:
        """The tokens by the tokenizer's character offsets; what lies between two tokens belongs to the second."""
        data = text.encode()
        at = np.cumsum([0, *(len(character.encode()) for character in text)])
        pairs = at[np.array(offsets, dtype=np.int64).reshape(-1, 2)]
        starts, ends = pairs[:, 0], pairs[:, 1]
        # Tokens of one character overlap: the bytes between them are not known, so the last of them has them all.
        later = np.append(np.minimum.accumulate(starts[::-1])[::-1][1:], len(data))[: len(ids)]
        ends = np.maximum.accumulate(np.where(ends <= later, ends, 0)) if len(ids) else ends
        ends[-1:] = len(data)
        starts = np.concatenate([np.zeros(min(1, len(ids)), dtype=np.int64), ends[:-1]])
        exact = [self.table[i] == data[start:end] for i, start, end in zip(ids, starts, ends, strict=True)]
        return Spelling(ids, text, ends, np.array(exact, dtype=bool))

    def continuation(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text and their character offsets, without the blank that SentencePiece puts before a text."""
        for anchor in ANCHORS:
            n, size = len(self.encoded(anchor)[0]), len(anchor)
            ids, offsets = self.encoded(anchor + text)
            if ids[:n] == self.encoded(anchor)[0] and all(start >= size for start, end in offsets[n:] if end > start):
                return ids[n:], [(max(start - size, 0), max(end - size, 0)) for start, end in offsets[n:]]
        return self.encoded(text)

    def encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text and their character offsets."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
        return list(encoded.input_ids), [(int(start), int(end)) for start, end in encoded.offset_mapping]

    def encoded_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, as `encoded` gives them; without offsets and several times faster for many."""
        self.backend.no_truncation()
        self.backend.no_padding()
        before, self.backend.encode_special_tokens = self.backend.encode_special_tokens, True
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            self.backend.encode_special_tokens = before


def by_bytes(ids: list[int], parts: list[bytes], blank: int) -> Spelling:
    """The tokens by their bytes, without a leading blank; where these are no UTF-8, the text has a replacement character."""
    raw, ends = b"".join(parts)[blank:], np.maximum(np.cumsum([len(part) for part in parts], dtype=np.int64) - blank, 0)
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
    exact = ends >= starts
    pieces: list[str] = []
    mapped, done, size = ends.copy(), 0, 0
    while done < len(raw):
        try:
            good, bad = raw[done:].decode(), 0
        except UnicodeDecodeError as error:
            good, bad = raw[done : done + error.start].decode(), error.end - error.start
        stop = done + len(good.encode())
        mapped[(ends >= done) & (ends <= stop)] = ends[(ends >= done) & (ends <= stop)] - done + size
        size += stop - done
        pieces.append(good)
        if bad:
            inside = (ends > stop) & (ends < stop + bad)
            mapped[inside] = size  # no end of a token's is inside of the character that replaces these bytes
            exact &= ~((starts < stop + bad) & (ends > stop))
            pieces.append(REPLACEMENT)
            size += len(REPLACEMENT.encode())
            mapped[ends == stop + bad] = size
        done = stop + bad
    return Spelling(list(ids), "".join(pieces), mapped, exact)


def inside_characters(ends: np.ndarray, parts: list[bytes | None], data: bytes) -> np.ndarray:
    """The ends of tokens, with those inside of what several write together, where their bytes are these of the text."""
    found, first, start = ends.copy(), 0, 0
    for i, end in enumerate(ends.tolist()):
        if end == start:
            continue
        group = [part for part in parts[first : i + 1] if part is not None]
        if len(group) == i + 1 - first and b"".join(group) == data[start:end]:
            found[first : i + 1] = start + np.cumsum([len(part) for part in group])
        first, start = i + 1, end
    return found


def decoder_kinds(backend: Any) -> set[str]:
    """The kinds of a tokenizer's decoders."""
    if backend.decoder is None:
        return set()
    node = json.loads(backend.decoder.__getstate__())
    return {node["type"], *(part["type"] for part in node.get("decoders", []))}


def byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level vocabularies: printable ones stand for themselves, the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
