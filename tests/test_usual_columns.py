"""Columns of the usual names, which need no mapping, and the line that says which were found."""

import json
import logging

import pytest

from opd_lightning import Distillation
from opd_lightning.config import compose
from opd_lightning.config.overrides import explain
from opd_lightning.preflight.rendering import left_rows
from opd_lightning.tasks import TableTask
from opd_lightning.tasks.verifiers import exact

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
SHAPES = {
    "pair": ({"prompt": "Q", "completion": "A"}, {}, ("A", None), "{prompt: prompt, completion: completion}"),
    "messages": ({"messages": TURNS}, {}, ("A", None), "{prompt: messages}"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {},
        ("A", None),
        "{prompt: ",
    ),
    "question": ({"question": "Q", "answer": "A"}, {}, ("A", "A"), "{prompt: question, answer: answer, completion: answer}"),
    "number": ({"question": "Q", "answer": 7}, {}, ("7", "7"), "completion: answer}"),
    "all": ({"question": "Q", "completion": "A", "answer": "B"}, {}, ("A", "B"), "completion: completion, answer: answer}"),
    "to verify": ({"prompt": "Q", "answer": "B"}, {}, (None, "B"), "{prompt: prompt, answer: answer}"),
    "prompt named": ({"title": "Q", "completion": "A"}, {"prompt": "title"}, (None, None), None),
    "skill named": ({"question": "Q", "answer": "A", "skill": "new"}, {"skill": "skill"}, ("A", "A"), "completion: answer}"),
    "answer named": ({"question": "Q", "answer": "B", "label": "L"}, {"answer": "label"}, (None, "L"), "{prompt: question}"),
    "no text": ({"prompt": "Q", "answer": ["B"]}, {}, (None, None), "{prompt: prompt}"),
    "empty": ({"prompt": "Q", "completion": None, "answer": " "}, {}, (None, None), "{prompt: prompt"),
    "chat beside": ({"messages": TURNS, "completion": "B"}, {}, ("A", None), "{prompt: messages}"),
    "all named": ({"prompt": "Q", "completion": "A"}, {"prompt": "prompt", "completion": "completion"}, ("A", None), None),
}


def numbered(row: dict, number: int) -> dict:
    """The row with another prompt."""
    return json.loads(json.dumps(row).replace('"Q"', f'"Q{number}"'))


def written(path, row: dict, n: int = 12) -> str:
    """A file of such rows."""
    path.write_text("".join(json.dumps(numbered(row, number)) + "\n" for number in range(n)))
    return str(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_columns_need_no_mapping(tmp_path, shape):
    row, columns, (completion, answer), sentence = SHAPES[shape]
    task = TableTask(written(tmp_path / "rows.jsonl", row), columns)
    examples = [example for split in ("train", "validation", "test") for example in task.examples(split)]
    assert len(examples) == 12 and {example.messages[-1]["content"][0] for example in examples} == {"Q"}
    assert {(example.completion, example.extra.get("answer")) for example in examples} == {(completion, answer)}
    told = task.notes.get("columns")
    assert (
        told is None if sentence is None else sentence in told and "'task.columns={<part>: <column>, ...}' sets others" in told
    )


def test_rows_that_differ_from_the_first_are_read_by_their_own_columns(tmp_path):
    rows = [*({"prompt": f"Q{i}"} for i in range(9)), {"prompt": "Q9", "completion": "A"}, {"question": "Q10", "answer": "B"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TableTask(str(tmp_path / "rows.jsonl"), {})
    found = {e.messages[0]["content"]: e.completion for split in task.splits for e in task.examples(split)}
    assert found == {**{f"Q{i}": None for i in range(9)}, "Q9": "A", "Q10": "B"}


def test_held_out_rows_and_verifiers_read_them_too(tmp_path):
    path = written(tmp_path / "rows.jsonl", {"question": "Q", "answer": "A"})
    other_rows = [{"prompt": f"other {i}", "answer": "A"} for i in range(4)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other_rows))
    task = TableTask(path, {}, heldout={"path": str(tmp_path / "other.jsonl")}, verifier=exact)
    assert all(task.verify(e, "A").content == 1 for split in task.splits for e in task.examples(split))
    assert [e.completion for e in task.examples("test")] == [None] * 4


def test_python_reads_them_as_the_command_line_does_and_the_line_is_logged(tiny, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"question": f"rotate {' '.join(f'{i:05}')}", "answer": f"{i:05}"} for i in range(20)]
    sft = Distillation("sft", tiny, rows, overrides={"task.max_new_tokens": 8})
    assert (
        sft.cfg.task.columns.completion is None and sft._parts.examples[0].completion == sft._parts.examples[0].extra["answer"]
    )
    assert "likelihood" in sft._parts.suite
    (line,) = [record.message for record in caplog.records if "columns by their names" in record.message]
    shown = [(result.name, result.state) for result in left_rows(sft._parts) if result.text == line]
    assert shown == [("data", "pass")] and "completion: answer" in line


def test_descriptions_of_tools_may_be_mapped_on_the_command_line():
    words = ["task=table", "task.path=rows.jsonl", "task.columns.tools=functions"]
    assert explain(words) is None and compose(words).task.columns.tools == "functions"
    assert "called tools; write task.columns.tools=<column>" in str(explain([*words[:2], "task.columns.functions=functions"]))
