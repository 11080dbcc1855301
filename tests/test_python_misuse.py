"""Misuse from Python: what would be left out, ignored or overwritten in silence is said, or refused with a remedy."""

import json

import pytest

from opd_lightning.preflight.rendering import left_rows
from opd_lightning.tasks.table import TableTask


class Parts:
    """`Components` as far as `left_rows` reads them."""

    def __init__(self, task):
        self.task = task


def file_of(folder, name, prompts) -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps({"prompt": prompt, "completion": str(i)}) for i, prompt in enumerate(prompts)))
    return str(path)


def warned(task) -> list[str]:
    return [result.text for result in left_rows(Parts(task)) if result.state == "warn"]


def test_repeated_prompts_are_said(tmp_path):
    task = TableTask(file_of(tmp_path, "rows.jsonl", [f"question {i // 10}" for i in range(100)]), {})
    said = "90 of 100 rows repeat a prompt, up to case and blanks, and are left out: one row of each prompt is kept."
    assert warned(task) == [said] == task.notes["warnings"]
    few = TableTask(file_of(tmp_path, "few.jsonl", [f"question {i}" for i in range(100)] + ["Question  1"]), {})
    assert few.notes["repeated_prompts"] == 1 and warned(few) == []


def test_rows_of_heldout_prompts_are_said(tmp_path):
    path = file_of(tmp_path, "rows.jsonl", [f"question {i}" for i in range(10)])
    heldout = file_of(tmp_path, "heldout.jsonl", ["question 1", "question 1", "question 2"])
    said = warned(TableTask(path, {}, heldout={"path": heldout}))
    assert [text.split(" repeat")[0] for text in said] == ["1 of 3 held-out rows", "2 of 10 rows"]
    assert said[1].endswith("one row of each prompt is kept, and none of a held-out prompt.")


def test_rows_that_are_all_held_out(tmp_path):
    path = file_of(tmp_path, "rows.jsonl", [f"question {i}" for i in range(10)])
    with pytest.raises(ValueError, match=r"all 10 rows of task.path=.* have prompts that task.heldout.path=.* holds out"):
        TableTask(path, {}, heldout={"path": path})
    most = file_of(tmp_path, "most.jsonl", [f"question {i}" for i in range(9)])
    with pytest.raises(ValueError, match=r"1 distinct prompt beside those of task\.heldout\.path"):
        TableTask(path, {}, heldout={"path": most})
