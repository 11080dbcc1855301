"""Long files: the same splits and ids as for short ones, without an example of each row in memory."""

import json
import random
from hashlib import blake2b, sha256

import pytest

from opd_lightning.tasks import TableTask, compact, first
from opd_lightning.tasks.compact import LazyExamples, plain_digest
from opd_lightning.tasks.first import FirstExamples
from opd_lightning.tasks.splits import digest_of, normal, other_fields
from opd_lightning.types import Example

RECORDED = {  # ids by split, as they were before rows were kept instead of examples
    (None, False): "75487a428ad2854f",
    (7, False): "7fb4c4011b4331c3",
    (None, True): "c360a0cfe488070b",
    (7, True): "0852e0a0f7797c8f",
}


def mixed(n: int, seed: int) -> list[dict]:
    """Rows of many kinds: plain, repeated, not ASCII, chats, JSON texts, numbers, blanks around, parts that are turns."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        text = f"Prompt {i if i % 7 else i // 2}"
        prompt = draw.choice([text, text.upper(), f"  {text}\n", f"{text} é ß İ", [{"role": "user", "content": text}]])
        prompt = draw.choice([prompt, prompt, prompt, json.dumps([{"from": "human", "value": f"{text}?"}]), f"[{i}]", f"{{{i}"])
        completion = draw.choice([f"c{i}", i, i / 4, f"[{i}]", [{"role": "assistant", "content": f"d{i}"}], f" e{i}"])
        rows.append({"prompt": prompt, "completion": completion, "answer": draw.choice([i, f"{i}"]), "notes": "x" * 50})
    return rows


def made(folder, n_train, apart, **options) -> TableTask:
    """A task of 300 mixed rows."""
    heldout = None
    for name, n, seed in (("rows", 300, 1), ("held/rows", 40, 2)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(mixed(n, seed))))
        heldout = {"path": str(path)} if apart else None
    columns = {"prompt": "prompt", "completion": "completion", "answer": "answer"}
    return TableTask(str(folder / "rows.jsonl"), columns, n_train=n_train, n_eval=20, heldout=heldout, **options)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("n_train", "apart"), RECORDED)
def test_splits_and_ids_are_those_recorded(tmp_path, monkeypatch, n_train, apart, lazy):
    if lazy:
        monkeypatch.setattr(compact, "AT_ONCE", 0)
        monkeypatch.setattr(first, "SPARE", 3)
    task = made(tmp_path, n_train, apart)
    assert isinstance(task.examples("train"), LazyExamples) == lazy
    notes = {name: note for name, note in task.notes.items() if name != "warnings"}
    found = repr({name: list(task.examples(name)) for name in ("train", "validation", "test")}) + repr(notes)
    found = found.replace(", turns=None, tools=None", "")  # fields that came later
    assert sha256(found.encode()).hexdigest()[:16] == RECORDED[n_train, apart]


def test_examples_that_are_made_when_asked_for_are_those_that_are_kept(tmp_path, monkeypatch):
    kept = made(tmp_path, None, False, system="Be brief.").examples("train")
    monkeypatch.setattr(compact, "AT_ONCE", 0)
    task = made(tmp_path, None, False, system="Be brief.", bad_rows="skip")
    lazy = task.examples("train")
    assert list(lazy) == kept and lazy[3] == kept[3] and lazy[-1] == kept[-1] and lazy[2:9:3] == kept[2:9:3]
    assert b"x" * 50 not in lazy.entries[0]  # a column that plays no part
    task.leave_out({kept[5].id: "It is bad."})
    assert list(task.examples("train")) == [*kept[:5], *kept[6:]]


def test_rows_that_cannot_be_pickled_are_kept_as_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "AT_ONCE", 0)
    task = made(tmp_path, None, False, prepare=lambda row: {**row, "completion": Text(f"reply {row}")})
    assert all(isinstance(e.completion, str) for e in task.examples("train"))


def test_a_plain_digest_is_the_examples_digest_and_that_of_the_chats_json(tmp_path):
    for system in (None, "Be  BRIEF."):
        task = TableTask(str(_written(tmp_path)), {"prompt": "prompt", "completion": "completion"}, system=system)
        digest = plain_digest(task.columns, system, answer=False)
        rows = mixed(300, 1)
        found = [digest(row) for row in rows]
        assert 20 < sum(d is not None for d in found) < 200
        for row, plain in zip(rows, found, strict=True):
            example = task._example("x:1", row)
            chat = [[m["role"], normal(m["content"]), *other_fields(m)] for m in example.messages]
            wanted = blake2b(json.dumps(chat, sort_keys=True, default=str).encode(), digest_size=16).digest()
            assert digest_of(example) == wanted and plain in (None, wanted)
    call = {"role": "assistant", "content": "", "tool_calls": [{"b": 1, "a": 2}]}
    wanted = blake2b(json.dumps([["assistant", "", {"tool_calls": [{"a": 2, "b": 1}]}]]).encode(), digest_size=16)
    assert digest_of(Example("x", [call])) == wanted.digest()


def test_a_line_is_one_object_and_nothing_else(tmp_path):
    """Each bad line is refused by its number, behind lines of the same columns that are read in less time."""
    good = '{"prompt": "a", "completion": "b"}'
    for bad in (f"{good} {good}", '{"prompt": "a",', '"completion": "b"}', f"{good},", f"[{good}]", "1", '{"prompt": "\x01"}'):
        (tmp_path / "rows.jsonl").write_text(f"{good}\n \n\t{good.replace('a', 'c')} \n{bad}\n{good}\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl:4: "):
            TableTask(str(tmp_path / "rows.jsonl"), {"prompt": "prompt", "completion": "completion"})


def test_a_selection_keeps_the_first_of_equal_positions(monkeypatch):
    monkeypatch.setattr(first, "SPARE", 2)
    selection = FirstExamples(3, without={b"z" * 16})
    digests = [bytes([5 - i % 5]) * 6 + bytes([i]) + bytes(9) for i in range(40)] + [b"z" * 16]
    for i, digest in enumerate(digests):
        if selection.add(digest):
            selection.keep(i)
    wanted = sorted(range(40), key=lambda i: (int.from_bytes(digests[i][:8]) >> 12, i))[:3]
    assert selection.parts([1, None]) == [wanted[:1], sorted(wanted[1:])]
    assert selection.distinct == 40 and selection.read == 41


class Text(str):
    """A text that cannot be pickled."""

    def __reduce__(self):
        raise TypeError("not pickled")


def _written(folder):
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(5)))
    return path
