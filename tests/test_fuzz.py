"""Whatever a user's file, command line or chat template holds: a result or one sentence, never a traceback from our code."""

import json
from pathlib import Path

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.checks import check
from opd_lightning.config import compose
from opd_lightning.data import encode_chat
from opd_lightning.names import find
from opd_lightning.overrides import explain
from opd_lightning.tasks import TableTask
from opd_lightning.tasks.world import world_tokenizer

QUICK = settings(max_examples=40, deadline=20_000, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=1500, deadline=20_000, suppress_health_check=list(HealthCheck))

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": values}), max_size=3
)
row = st.fixed_dictionaries(
    {"prompt": st.text(max_size=12) | chats | values}, optional={"completion": values, "answer": values}
)
lines = st.one_of(
    row.map(lambda r: json.dumps(r).encode()), st.binary(max_size=30), values.map(lambda v: json.dumps(v).encode())
)


def read(folder: Path, content: list[bytes], suffix: str, bad_rows: str, end: bytes) -> None:
    path = folder / f"rows{suffix}"
    path.write_bytes(end.join(content))
    columns = {"prompt": "prompt", "completion": "completion"}
    try:
        task = TableTask(str(path), columns, verifier=find("opd_lightning.tasks.verifiers.exact"), bad_rows=bad_rows)
    except ValueError as error:
        assert str(error).strip()
        return
    ids = [e.id for split in ("train", "validation", "test") for e in task.examples(split)]
    assert len(ids) == len(set(ids)) and all(e.messages[-1]["content"] for e in task.examples("train"))


DATA = given(
    content=st.lists(lines, max_size=8),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
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


KEYS = [
    "method",
    "teacher",
    "optim.lr",
    "data.batch_size",
    "loss/divergence",
    "rollout.temperature",
    "name",
    "study.name",
    "seed",
]
KEYS += [
    "trainer.max_steps",
    "budget.accuracy",
    "micro_tokens",
    "task.n_eval",
    "task.skill",
    "start_from",
    "model.path",
    "chunk",
]
overrides = st.lists(
    st.tuples(
        st.sampled_from(KEYS) | st.text(max_size=8),
        st.sampled_from(["sft", "opd", "null", "-1", "0", "1e-3", "[1,2]", "{a: 1}", "../x", "${oc.env:HOME}", "''"])
        | st.text(max_size=10),
    ).map("=".join),
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


@QUICK
@given(arguments=overrides)
def test_any_command_line_is_taken_or_refused(arguments):
    compose_or_refuse(arguments)


@pytest.mark.slow
@LONG
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
