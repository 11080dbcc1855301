"""Whatever a user's file, command line or chat template holds: a result or one sentence, never a traceback from our code."""

import json
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.config import compose
from opd_lightning.config.compatibility import check
from opd_lightning.config.names import find
from opd_lightning.config.overrides import explain
from opd_lightning.data.renderer import encode_chat
from opd_lightning.tasks import TableTask
from opd_lightning.toy.world import world_tokenizer

QUICK = settings(max_examples=40, deadline=20_000, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=1500, deadline=20_000, suppress_health_check=list(HealthCheck))

halves = st.sampled_from(["\ud800", "word\udfff", "\udc80\ud83d"])
words = st.text(max_size=12) | halves
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": values}), max_size=3
)
row = st.fixed_dictionaries({"prompt": words | chats | values}, optional={"completion": values, "answer": values})
pairs = st.fixed_dictionaries({"prompt": words, "completion": words})
cells = st.sampled_from([b"word", b"7", b'"a, b"', b'"two\nlines"', b'"', b"\xe9", b"\0", b"", b'"a"b'])
lines = st.one_of(
    (row | pairs | values).map(lambda r: json.dumps(r).encode()),
    st.binary(max_size=30),
    st.lists(cells | st.text(max_size=4).map(str.encode), min_size=2, max_size=2).map(b",".join),
)


def as_parquet(content: list[bytes]) -> bytes | None:
    """The lines that are rows as a parquet table; None where they make none, or pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        return None
    import pyarrow as pa
    from pyarrow import parquet

    try:
        parsed = [json.loads(line) for line in content]
        stream = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist([r for r in parsed if isinstance(r, dict)]), stream)
        return stream.getvalue().to_pybytes()
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return None


def read(folder: Path, content: list[bytes], suffix: str, bad_rows: str, end: bytes) -> None:
    """Rows that any tokenizer takes, or a sentence; and no file is written."""
    path = folder / f"rows{suffix}"
    table = as_parquet(content) if suffix == ".parquet" else None
    path.write_bytes(end.join(content) if table is None else table)
    columns = {"prompt": "prompt", "completion": "completion", "answer": "completion"}
    with chdir(folder):
        try:
            task = TableTask(str(path), columns, verifier=find("opd_lightning.tasks.verifiers.exact"), bad_rows=bad_rows)
        except ValueError as error:
            assert str(error).strip() and str(error).encode()
            return
        finally:
            assert list(folder.rglob("*")) == [path]
    examples = [e for split in ("train", "validation", "test") for e in task.examples(split)]
    ids = [e.id for e in examples]
    assert len(ids) == len(set(ids)) and all(e.messages[-1]["content"] for e in task.examples("train"))
    assert all(json.dumps(asdict(e), ensure_ascii=False).encode() for e in examples)


DATA = given(
    content=st.tuples(st.sampled_from([[], [b"prompt,completion"]]), st.lists(lines, max_size=8)).map(lambda t: t[0] + t[1])
    | st.lists(pairs.map(lambda r: json.dumps(r).encode()), max_size=8),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]),
    bad_rows=st.sampled_from(["refuse", "skip"]),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
)


@QUICK
@DATA
def test_any_file_is_read_or_refused(tmp_path_factory, content, suffix, bad_rows, end):
    read(tmp_path_factory.mktemp("fuzz"), content, suffix, bad_rows, end)


@pytest.mark.slow
@LONG
@DATA
def test_many_files_are_read_or_refused(tmp_path_factory, content, suffix, bad_rows, end):
    read(tmp_path_factory.mktemp("fuzz"), content, suffix, bad_rows, end)


def dotted(node: Any, place: str = "") -> Iterator[str]:
    """Every key of a configuration, such as "optim" and "optim.lr"."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield place + str(key)
            yield from dotted(value, f"{place}{key}.")


KEYS = sorted(dotted(OmegaConf.to_container(compose([]))))
CHOICES = ["method=sft", "method=grpo", "loss/divergence=jsd", "task=table", "task=instructions", "teacher=none"]
GIVEN = ["null", "[]", "[null]", "{}", "sft", "-1", "0", "1e-3", "true", "[1,2]", "{a: 1}", "../x", "${oc.env:HOME}", "''"]
overrides = st.lists(
    st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), st.sampled_from(GIVEN) | st.text(max_size=10)).map("=".join)
    | st.sampled_from(CHOICES),
    min_size=1,
    max_size=3,
)


def compose_or_refuse(arguments: list[str]) -> None:
    if (problem := explain(arguments)) is not None:
        assert problem.strip()
        return
    try:
        check(compose([a for a in arguments if "=" in a]))
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        assert str(error).strip()


@settings(QUICK, max_examples=12)  # composing takes its time
@given(arguments=overrides)
def test_any_command_line_is_taken_or_refused(arguments):
    compose_or_refuse(arguments)


@pytest.mark.slow
@settings(LONG, max_examples=300)
@given(arguments=overrides)
def test_many_command_lines_are_taken_or_refused(arguments):
    compose_or_refuse(arguments)


TEMPLATES = [
    "{%",
    "for",
    "m",
    "in",
    "messages",
    "%}",
    "{%",
    "endfor",
    "%}",
    "{{m['content']}}",
    "{{messages[5].x.y}}",
    "{%if",
    "{{1/0}}",
    "{{m}}",
    "=",
    "{#",
    "%}",
    "rotate",
    "{{raise_exception('no')}}",
    "{{''.__class__.__mro__}}",
    "{{undefined.attribute}}",
    "{{messages|tojson}}",
]
pieces = st.sampled_from(["{% for m in messages %}", "{% endfor %}", *TEMPLATES])


@QUICK
@given(template=st.lists(pieces, max_size=6).map("".join))
def test_any_chat_template_renders_or_is_refused(template):
    tokenizer = world_tokenizer()
    tokenizer.chat_template = template or "="
    try:
        ids = encode_chat(tokenizer, [{"role": "user", "content": "rotate 1 2 3 4 5"}])
    except ValueError as error:
        assert str(error).strip()
        return
    assert all(isinstance(i, int) for i in ids)
