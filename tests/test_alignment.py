"""Byte spans of tokens, and the alignment of two tokenizations: no token is lost, and spans are the same bytes."""

from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_lightning.data.alignment import align, shared_tokens, with_end
from opd_lightning.data.token_bytes import TokenBytes
from tests.zoo import TEXTS, tokenizers

NAMES = ("byte_bpe", "small_bpe", "unigram", "prefixed", "normalised", "wordpiece", "characters")
PLANTED = [
    *TEXTS,
    "",
    " ",
    "  leading and trailing  ",
    "👩‍👩‍👧 🙂🙂 🏳️‍🌈",
    "e\u0301 a\u0308o\u0302 \u1100\u1161",
    "漢字かな混じり文、句読点。",
    "ﬁ ½ Ⅷ \uff46\uff55\uff4c",
    "▁ literal ▁the",
    "<s> </s> <unk> <0x41>",
    "\t\r\n\n\x00\x7f",
    "don't stop , please .",
]
CODE = st.sampled_from(["def f(", "):\n\t", "return ", "x ** 2", '{"name": "', '"}}', "</tool_call>", "# ", "the ", "red"])
TEXT = st.one_of(
    st.text(max_size=24),
    st.lists(CODE, max_size=6).map("".join),
    st.sampled_from(PLANTED),
    st.text("a é🙂漢\u0301 \n", max_size=16),
)


@cache
def table(name: str) -> TokenBytes:
    return TokenBytes(tokenizers()[name])


def check_spelling(spelling, table: list[bytes | None], own: bool):
    """The spans of the tokens are the text, and exact tokens of the table are the bytes that they cover.

    Args:
        own: whether the tokens are the tokenizer's choice, of which those that differ are not exact. Of others a decoder may
            drop the first blank, or put one before a special token.
    """
    data, spans = spelling.text.encode(), list(zip(spelling.starts, spelling.ends, strict=True))
    assert len(spans) == len(spelling.ids) == len(spelling.exact)
    assert b"".join(data[start:end] for start, end in spans) == (data if spans else b"")
    for i, (start, end), exact in zip(spelling.ids, spans, spelling.exact, strict=True):
        if own:
            assert exact == (data[start:end] == table[i]), (spelling, i)
        elif exact and 0 < start < end and table[i] is not None:  # the table is of tokens behind other text
            assert data[start:end].removeprefix(b" ") == table[i].removeprefix(b" "), (spelling, i)


def check_pair(student: TokenBytes, teacher: TokenBytes, ids: list[int], ended: bool):
    mine = student.spell(ids)
    assert mine.text == student.backend.decode(ids, skip_special_tokens=False)
    check_spelling(mine, student.table, own=False)
    theirs = teacher.encode(mine.text)
    assert theirs.text == mine.text
    check_spelling(theirs, teacher.table, own=True)
    one, two = with_end(mine, ended), with_end(theirs, ended)
    if not len(one) or not len(two):
        assert len(align(one, two).bounds) == 1
        return
    spans = align(one, two)
    for ends, first in ((one, spans.student), (two, spans.teacher)):
        assert first[0] == 0 and first[-1] == len(ends) and (np.diff(first) > 0).all()  # every token is in one span
        assert [int(end) for end in ends[first[1:] - 1]] == spans.bounds[1:].tolist()  # which has its bytes
    inside = set(one.tolist()) & set(two.tolist())
    assert inside - {0} == set(spans.bounds.tolist()) - {0}  # and no span could be cut


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=TEXT, ended=st.booleans(), data=st.data())
def test_spans_are_the_same_bytes(text, ended, data):
    """Of the tokenizer's own tokens, and of any tokens, which need not be text."""
    student, teacher = (table(data.draw(st.sampled_from(NAMES))) for _ in range(2))
    ids = student.encode(text).ids
    check_pair(student, teacher, ids, ended)
    check_pair(student, teacher, data.draw(st.lists(st.integers(0, len(student.table) - 1), max_size=12)), ended)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXT, ended=st.booleans(), data=st.data())
def test_spans_are_the_same_bytes_of_many_texts(text, ended, data):
    student, teacher = (table(data.draw(st.sampled_from(NAMES))) for _ in range(2))
    check_pair(student, teacher, student.encode(text).ids, ended)
    check_pair(student, teacher, data.draw(st.lists(st.integers(0, len(student.table) - 1), max_size=24)), ended)


@pytest.mark.parametrize("teacher", NAMES)
def test_planted_texts_are_spans_of_the_same_bytes(teacher):
    for text in PLANTED:
        check_pair(table("byte_bpe"), table(teacher), table("byte_bpe").encode(text).ids, ended=True)


@pytest.mark.parametrize("name", ["byte_bpe", "small_bpe", "unigram", "characters"])
def test_equal_tokenizers_give_the_identity(name):
    tokens = table(name)
    for text in PLANTED:
        ids = tokens.encode(text).ids
        mine = tokens.spell(ids)
        theirs = tokens.encode(mine.text)
        if not ids or theirs.ids != ids:
            continue
        spans = align(with_end(mine, True), with_end(theirs, True))
        assert spans.single.all() and len(spans.single) == len(ids) + 1
    pairs = shared_tokens(tokens, tokens)
    assert pairs[0] == pairs[1] and len(pairs[0]) == len(tokens.tokenizer.get_vocab())


def test_a_character_split_over_tokens_is_aligned_by_its_bytes():
    student, teacher = table("small_bpe"), table("unigram")
    emoji = student.encode("🙂")
    assert len(emoji.ids) == 4 and emoji.ends.tolist() == [1, 2, 3, 4]
    spans = align(emoji.ends, teacher.encode("🙂").ends)  # by byte fallback
    assert spans.bounds.tolist() == [0, 1, 2, 3, 4] and spans.single.all()
    whole = align(emoji.ends, table("normalised").by_offsets([1, 1], [(0, 1), (0, 1)], "🙂").ends)
    assert whole.bounds.tolist() == [0, 4] and whole.teacher.tolist() == [0, 2]


def test_a_split_character_is_aligned_by_its_bytes_beside_what_is_no_text():
    """Two bytes of one character behind a byte alone, which the decoder writes as a replacement character."""
    tokens = table("unigram")
    alone, unknown, *character = (tokens.tokenizer.convert_tokens_to_ids(t) for t in ("<0x80>", "<unk>", "<0xC2>", "<0x80>"))
    spelling = tokens.spell([alone, unknown, *character])
    assert spelling.text.endswith("\x80") and np.diff(spelling.ends)[-2:].tolist() == [1, 1]
    check_pair(tokens, table("byte_bpe"), spelling.ids, ended=False)


def test_what_is_no_text_is_marked():
    tokens = table("small_bpe")
    part = tokens.table.index("🙂".encode()[:1])
    word = tokens.encode("red").ids
    spelling = tokens.spell([*word, part, *word])
    assert spelling.text == "red\ufffdred" and spelling.ends[-1] == 9
    assert spelling.exact.tolist() == [*[True] * len(word), False, *[True] * len(word)]


def test_a_normaliser_and_dropped_blanks_are_not_exact():
    lower = table("normalised").encode("The ﬁ red")
    assert lower.text == "The ﬁ red" and lower.ends[-1] == len("The ﬁ red".encode())
    assert not lower.exact[0] and lower.exact[-1]
    pieces = table("wordpiece").encode("red  blue")
    assert pieces.ends.tolist() == [3, 9] and pieces.exact.tolist() == [False, False]
    assert table("prefixed").encode("the red").exact.all()  # without the blank that it puts before a text


def test_shared_tokens_are_the_same_bytes():
    student, teacher = table("byte_bpe"), table("unigram")
    mine, theirs = shared_tokens(student, teacher, (2, 2))
    assert len(set(theirs)) == len(theirs) > 60 and (2, 2) in set(zip(mine, theirs, strict=True))
    assert all(student.table[s] == teacher.table[t] for s, t in zip(mine, theirs, strict=True))
    assert student.tokenizer.get_vocab()["a"] in mine and teacher.tokenizer.get_vocab()["a"] in theirs
    assert not set(theirs) & (teacher.fallback - {teacher.tokenizer.get_vocab()[f"<0x{b:02X}>"] for b in range(256)})


def test_texts_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="not of one text"):
        align(np.array([1, 2]), np.array([3]))
