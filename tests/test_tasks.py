"""Tasks from rows and from reasoning-gym: disjoint splits, mapped columns, errors by file and line, recipes."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import opd_lightning
from opd_lightning.config import build, compose
from opd_lightning.tasks.reasoning import ReasoningGymTask
from opd_lightning.tasks.rows import read_rows
from opd_lightning.tasks.splits import distinct, key_of, near_duplicates
from opd_lightning.tasks.table import TableTask
from opd_lightning.tasks.verifiers import Function, Math, Regex
from opd_lightning.training.run import run
from opd_lightning.types import Verdict

ROWS = [{"q": f"What is {i} plus {i + 1}?", "a": str(2 * i + 1), "why": f"{i} + {i + 1} = {2 * i + 1}"} for i in range(30)]
COLUMNS = {"prompt": "q", "completion": "why", "answer": "a"}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path) -> str:
    return write(tmp_path / "rows.jsonl", ROWS)


def prompts(task, split) -> set[str]:
    return {key_of(e) for e in task.examples(split)}


def test_splits_are_disjoint_complete_and_blind_to_the_order_of_rows(file, tmp_path):
    task = TableTask(file, COLUMNS)
    sides = [prompts(task, split) for split in ("train", "validation", "test")]
    assert [len(s) for s in sides] == [24, 3, 3] and len(set.union(*sides)) == 30
    shuffled = TableTask(write(tmp_path / "shuffled.jsonl", ROWS[::-1]), COLUMNS)
    assert [prompts(shuffled, split) for split in ("train", "validation", "test")] == sides


def test_equal_prompts_are_kept_once_and_held_out_ones_leave_training(tmp_path):
    """Case and blanks apart; the held-out file wins."""
    train = write(tmp_path / "train.jsonl", [*ROWS, {**ROWS[0], "q": "  what is 0 PLUS 1? "}])
    test = write(tmp_path / "test.jsonl", [{k: v for k, v in row.items() if k != "why"} for row in ROWS[:5]])
    task = TableTask(train, COLUMNS, heldout={"path": test}, n_eval=4)
    assert len(task.examples("test")) == 4 and all(e.completion is None for e in task.examples("test"))
    everything = prompts(task, "train") | prompts(task, "validation")
    assert len(everything) == 25 and not everything & {key_of(e) for e in TableTask(test, {"prompt": "q"}).examples("train")}


@given(st.lists(st.text(alphabet="ab c", min_size=1, max_size=6).filter(str.strip), min_size=4, max_size=40, unique=True))
def test_any_rows_make_disjoint_splits_or_a_clear_refusal(tmp_path_factory, texts):
    path = write(tmp_path_factory.mktemp("h") / "rows.jsonl", [{"prompt": t} for t in texts])
    try:
        task = TableTask(path, {"prompt": "prompt"})
    except ValueError as error:
        assert "distinct prompts" in str(error)
        return
    sides = [prompts(task, split) for split in ("train", "validation", "test")]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides))


def test_near_duplicates_are_found_and_distinct_texts_are_not(file):
    long = "A farmer has twelve sheep, sells five of them on Monday and buys three more on Tuesday. How many are left"
    rows = [{"q": f"{long}?"}, {"q": f"{long} now?"}, {"q": "Name a river in Portugal that reaches the sea at Porto."}]
    columns = {"prompt": "q"}
    examples = [TableTask._example(_bare(columns), f"r:{i}", row, False) for i, row in enumerate(rows)]
    assert near_duplicates([examples[1], examples[2]], [examples[0]]) == [("r:1", "r:0")]
    assert len(distinct([examples[0], examples[0], examples[2]])) == 2


def _bare(columns):
    task = object.__new__(TableTask)
    task.columns, task.system, task.verifies = columns, None, False
    return task


def test_columns_may_be_templates_chats_and_system_prompts(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    rows = [{"chat": [*turns[:1], {"role": "user", "content": f"Hi {i}"}, turns[2]], "n": i} for i in range(4)]
    task = TableTask(write(tmp_path / "c.jsonl", rows), {"prompt": "chat", "answer": "n", "skill": "kind {n}"}, system="unused")
    example = task.examples("train")[0]
    assert [m["role"] for m in example.messages] == ["system", "user"] and example.messages[0]["content"] == "Be brief."
    assert example.completion == example.demonstration == "Yo" and example.skill.startswith("kind ")
    options = [{"q": f"Pick {i}", "options": {"text": ["x", "y"]}} for i in range(4)]
    template = {"prompt": "{q}: A {options[text][0]}, B {options[text][1]} {{literal}}"}
    task = TableTask(write(tmp_path / "o.jsonl", options), template, system="Choose.")
    chat = task.examples("train")[0].messages
    assert chat[0] == {"role": "system", "content": "Choose."} and chat[1]["content"].endswith(": A x, B y {literal}")


def test_every_kind_of_file_gives_the_same_rows(tmp_path, file):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    lines = ["q,a,why", *(f'"{r["q"]}","{r["a"]}","{r["why"]}"' for r in ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved_dict")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved", "saved_dict"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == ROWS, name


def test_spreadsheets_marks_and_null_cells(tmp_path):
    """A byte-order mark is no part of a column's name; a template around nothing is nothing; ids stay unique."""
    lines = ["prompt,hint", *(f"word {i},{i}" for i in range(4))]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines))
    assert TableTask(str(tmp_path / "a.csv"), {"prompt": "prompt"}).examples("train")
    (tmp_path / "b.csv").write_bytes("prompt\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.csv:2: the column 'prompt' has bytes that are no text .* save it as UTF-8"):
        TableTask(str(tmp_path / "b.csv"), {"prompt": "prompt"})
    rows = [{"q": f"word {i}", "hint": None if i == 2 else "h"} for i in range(4)]
    with pytest.raises(ValueError, match=r"c\.jsonl:3: the prompt is empty"):
        TableTask(write(tmp_path / "c.jsonl", rows), {"prompt": "{q} {hint}"})
    (tmp_path / "held").mkdir()
    held = write(tmp_path / "held" / "c.jsonl", [{"q": f"other {i}"} for i in range(3)])
    task = TableTask(write(tmp_path / "c.jsonl", rows), {"prompt": "q"}, heldout={"path": held})
    ids = [e.id for split in ("train", "validation", "test") for e in task.examples(split)]
    assert len(set(ids)) == len(ids) == 7 and "heldout/c.jsonl:1" in ids


MALFORMED = {
    "not_json": ('{"prompt": "a"}\n{"prompt": \n', r"bad\.jsonl:2: not JSON"),
    "not_utf8": (b'{"prompt": "a"}\n\xff\xfe\n', r"bad\.jsonl:2: not JSON in UTF-8"),
    "not_an_object": ('{"prompt": "a"}\n\n["b"]\n', r"bad\.jsonl:3: is list, not an object"),
    "empty": ("", r"bad\.jsonl has no rows"),
    "no_column": (
        '{"prompt": "a"}\n{"promt": "b"}\n',
        r"bad\.jsonl:2: task\.columns\.prompt=prompt is no column; did you mean promt\?",
    ),
    "empty_prompt": ('{"prompt": "a"}\n{"prompt": "  "}\n', r"bad\.jsonl:2: the prompt is empty"),
    "prompt_is_a_number_list": ('{"prompt": [1]}\n', r"bad\.jsonl:1: a turn of the chat is '1'"),
    "too_few": ('{"prompt": "a"}\n{"prompt": "A"}\n{"prompt": "b"}\n', r"has 2 distinct prompts; the splits need 3"),
}


@pytest.mark.parametrize(("content", "sentence"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_rows_are_named_by_file_and_line(tmp_path, content, sentence):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        TableTask(str(path), {"prompt": "prompt"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": "nowhere.jsonl"}, r"task\.path=nowhere\.jsonl does not exist"),
        ({"columns": {"promt": "q"}}, r"task\.columns\.promt is no part of an example; did you mean prompt\?"),
        ({"columns": {"completion": "a"}}, r"task\.columns\.prompt is missing"),
        ({"columns": {"prompt": "q", "completion": "whyy"}}, r"rows\.jsonl:1: .*whyy is no column; did you mean why\?"),
        ({"columns": {"prompt": "{q} {nope}"}}, r"rows\.jsonl:1: .*cannot be filled in \('nope' is missing\)"),
        ({"columns": {"prompt": "{q"}}, r"is no template"),
        (
            {"columns": {"prompt": "q", "id": "same {a[0]}"}},
            r"rows\.jsonl:6: task\.columns\.id=same \{a\[0\]\} is 'same 1' as in rows\.jsonl:1; give every row another, or",
        ),
        ({"verify_seconds": 0}, r"task\.verify_seconds=0 must exceed 0"),
        ({"verify_seconds": float("inf")}, r"task\.verify_seconds=inf must exceed 0, up to a day"),
        ({"verifier": lambda c, a: None, "columns": {"prompt": "q"}}, r"rows\.jsonl:1: has no answer for task\.verifier"),
        ({"n_eval": 0}, r"task\.n_eval=0"),
        ({"columns": {"prompt": 1}}, r"rows\.jsonl:1: task\.columns\.prompt=1 is no column"),
        ({"columns": {"prompt": "{q.text}"}}, r"rows\.jsonl:1: .*cannot be filled in"),
        ({"heldout": {"pth": "x"}}, r"task\.heldout\.pth is unknown; did you mean path\?"),
        ({"heldout": {"split": "x"}}, r"task\.heldout\.path is missing"),
        (
            {"prepare": lambda row: row["nope"]},
            r"rows\.jsonl:1: task\.prepare raised KeyError \('nope'\); columns are q, a, why",
        ),
        ({"path": "mine.jsonll"}, r"mine\.jsonll does not exist and is of no known kind; did you mean \.jsonl\?"),
        ({"prepare": lambda row: None}, r"task\.prepare leaves no row"),
    ],
)
def test_bad_options_are_refused_by_name(file, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TableTask(**{"path": file, "columns": COLUMNS, **options})


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_reasoning_gym_tasks_have_disjoint_splits_and_their_own_scores():
    task = ReasoningGymTask("chain_sum", n_train=40, n_eval=10)
    sides = [prompts(task, split) for split in ("train", "validation", "test")]
    assert [len(s) for s in sides] == [40, 10, 10] and len(set.union(*sides)) == 60
    example = task.examples("train")[0]
    right = task.verify(example, f"So <answer>{task.entries[example.id]['answer']}</answer>")
    assert (right.content, right.format) == (1.0, 1.0) and task.verify(example, example.completion).content == 1.0
    assert task.verify(example, task.entries[example.id]["answer"]) != right  # right, but without the tags
    assert task.verify(example, "").content == 0.0 and task.verify(example, "<answer>x</answer>").format == 1.0
    again = ReasoningGymTask("chain_sum", n_train=40, n_eval=10)
    assert [e.id for e in again.examples("train")] == [e.id for e in task.examples("train")]


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "chain_sums"}, r"task\.name=chain_sums is no data set of reasoning-gym; did you mean chain_sum\?"),
        ({"name": "chain_sum", "options": {"nope": 1}}, r"task\.options=.* does not suit task\.name=chain_sum"),
        ({"name": "chain_sum", "n_train": 0}, r"task\.n_train=0"),
        (
            {
                "name": "chain_sum",
                "n_train": 600,
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            },
            r"only \d+ distinct problems for the train split",
        ),
    ],
)
def test_bad_reasoning_gym_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ReasoningGymTask(**options)


SCIENCE = {
    "prompt": {"default": "Answer."},
    "choices": {"text": ["1 mol", "2 mol", "3 mol", "4 mol"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
    "type": "mcq-4-choices",
    "domain": "Chemistry",
    "details": {"level": "L3", "task": "t", "subtask": "s", "source": "x"},
    "answer": "",
}
TOOL = {
    "name": "Weather",
    "description": "d",
    "nl_documentation": "n",
    "instruction": "i",
    "golden_answer": [
        {"Action": "get", "Action_Input": '{"city": {"name": "Rome"}}'},
        {"Action": "get", "Action_Input": '{"d": 1}'},
    ],
}
CALLS = 'I need it.\nAction: get\nAction Input: {"city": {"name": "Rome"}}\nThen\nAction: get\nAction Input: {"d": 1}'
MATH = {"level": "Level 3", "type": "Algebra"}
RECIPES = {
    "gsm8k": (
        lambda i: {
            "question": f"Tom has {i} apples and buys {i}. How many?",
            "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>\n#### {1000 * i:,}",
        },
        lambda e: f"It is 7, so #### {e.extra['answer'].split('#### ')[1]}.00",
        "#### 7",
    ),
    "math": (
        lambda i: {**MATH, "problem": f"Find $x$ if $2x = {i}$.", "solution": f"Halve: $\\boxed{{\\frac{{{i}}}{{2}}}}$."},
        lambda e: f"$x = \\boxed{{{int(e.messages[-1]['content'].split('= ')[1].split('$')[0]) / 2}}}$",
        "\\boxed{77}",
    ),
    "openthoughts": (
        lambda i: {
            "problem": f"Find $x$ if $x = {i}$.",
            "solution": f"So $\\boxed{{{i}}}$.",
            "source": "s",
            "conversations": [],
        },
        lambda e: e.completion,
        "\\boxed{99999}",
    ),
    "toolalpaca": (
        lambda i: {**TOOL, "prompt": f"Use tools. Question: {i}", "golden_response": [CALLS]},
        lambda e: e.completion,
        "Action: get\nAction Input: {}",
    ),
    "science": (
        lambda i: {**SCIENCE, "question": f"How much of compound {i} is made?"},
        lambda e: "Because. <answer>C</answer>",
        "<answer>B</answer>",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_read_rows_of_the_public_columns(tmp_path, name):
    """Rows made here, with the columns of the data set; the reference is right and another answer is wrong."""
    row, right, wrong = RECIPES[name]
    train = write(tmp_path / "train.jsonl", [row(i) for i in range(1, 25)])
    test = write(tmp_path / "test.jsonl", [row(i) for i in range(30, 36)])
    held = [] if name == "science" else [f"task.heldout.path={test}", "task.n_eval=6"]
    task = build(compose([f"task={name}", f"task.path={train}", *held, "task.name=null"]).task)
    assert len(task.examples("train")) >= 18 and task.verifies and task.examples("test") and task.examples("validation")
    for example in [*task.examples("train"), *task.examples("test")]:
        assert task.verify(example, right(example)).content == 1.0, example
        verdict = task.verify(example, wrong)
        assert verdict.content == 0.0 and verdict.format == 1.0
        assert task.verify(example, "").content == 0.0 and task.verify(example, "I do not know.").format == 0.0
        assert name == "science" or example.completion


def test_rows_that_a_recipe_does_not_mean_are_left_out():
    from opd_lightning.tasks.recipes import boxed_only, science, tool_use

    row = {**SCIENCE, "question": "Q"}
    assert science(row)["question"].endswith("\nD: 4 mol") and science(row)["answer"] == "C"
    assert science({**row, "domain": "Biology"}) is None and science({**row, "type": "filling"}) is None
    assert boxed_only({"solution": "no answer"}) is None
    columns = {"Action": ["get"], "Action_Input": ["{}"]}
    assert json.loads(tool_use({"prompt": "p", "golden_answer": columns})["calls"]) == [{"Action": "get", "Action_Input": {}}]
    with pytest.raises(ValueError, match="not an object"):
        tool_use({"prompt": "p", "golden_answer": [{"Action": "get", "Action_Input": "[1]"}]})


TEN = """
{"q": "What colour is the sky by day?", "a": "Blue."}
{"q": "What colour is grass?", "a": "Green."}
{"q": "What colour is snow?", "a": "White."}
{"q": "What colour is coal?", "a": "Black."}
{"q": "What colour is a ripe lemon?", "a": "Yellow."}
{"q": "What colour is a ripe tomato?", "a": "Red."}
{"q": "What colour is chocolate?", "a": "Brown."}
{"q": "What colour is a flamingo?", "a": "Pink."}
{"q": "What colour is an elephant?", "a": "Grey."}
{"q": "What colour is a ripe aubergine?", "a": "Purple."}
"""


@pytest.mark.parametrize("method", ["sft", "sdft", "opd"])
def test_ten_lines_written_by_hand_train(small, tmp_path, method):
    (tmp_path / "ten.jsonl").write_text(TEN)
    columns = "task.columns={prompt: q, completion: a, answer: a}"
    folder = run(
        small(
            f"method={method}",
            "task=table",
            f"task.path={tmp_path / 'ten.jsonl'}",
            columns,
            "task/verifier=exact",
            "task.max_new_tokens=8",
            "~task.n_train",
        )
    )
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "finished" and status["data"] == {
        "train": 8,
        "heldout": 1,
        "near_duplicates": 0,
        "repeated_prompts": 0,
        "digest": ANY,
    }


def test_the_worked_example_of_the_readme_runs(small, tmp_path, monkeypatch):
    """The code and the configuration of opd_lightning/tasks/README.md, as they stand there."""
    text = (Path(opd_lightning.__file__).parent / "tasks" / "README.md").read_text()
    code, config = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL).group(1) for kind in ("python", "yaml"))
    (tmp_path / "my_tasks.py").write_text(code)
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "doubling.yaml").write_text(config)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = build(OmegaConf.create(yaml.safe_load(config)))
    assert [len(task.examples(s)) for s in ("train", "validation", "test")] == [80, 20, 20]
    assert task.verify(task.examples("test")[0], " 4000\n") == Verdict(1.0, 1.0)
    cfg = small("method=grpo", "~task.n_train", "~task.n_eval")
    cfg.task = OmegaConf.create(yaml.safe_load(config))
    assert json.loads((run(cfg) / "status.json").read_text())["state"] == "finished"


def test_an_answer_may_stand_anywhere_but_not_inside_a_word():
    from opd_lightning.tasks.verifiers import contains

    assert contains("The capital is  Tarnis.", "tarnis").content == 1.0
    assert contains("Tarnishes", "Tarnis").content == contains("", "Tarnis").content == 0.0
    assert contains("a (b) c", "(b)").content == 1.0


def test_malformed_rows_are_refused_by_line_or_skipped_and_listed(tmp_path):
    """Unicode, a byte-order mark, Windows line ends and a very long row are rows like others."""
    good = [
        json.dumps({"prompt": f"Größe {i} 漢字 \u2028 {'x' * (10**5 if i == 3 else 1)}", "completion": "ja"}) for i in range(12)
    ]
    lines = [*good[:4], '{"prompt": "half', '["no row"]', "\xff", '{"prompt": "", "completion": "x"}', *good[4:]]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode("latin-1", "ignore").replace(b"\xff", b"\xff\xfe"))
    columns = {"prompt": "prompt", "completion": "completion"}
    with pytest.raises(ValueError, match=r"rows\.jsonl:5: not JSON"):
        TableTask(str(path), columns)
    task = TableTask(str(path), columns, bad_rows="skip")
    assert task.notes["skipped_rows"] == 4 and "rows.jsonl:5" in task.notes["skipped_list"][0]
    assert sum(len(task.examples(split)) for split in ("train", "validation", "test")) == 12
    with pytest.raises(ValueError, match=r"leaves no row, the first for this: .*rows.jsonl:5: not JSON"):
        TableTask(str(path), {"prompt": "nothing"}, bad_rows="skip")
    with pytest.raises(ValueError, match="choose refuse or skip"):
        TableTask(str(path), columns, bad_rows="maybe")


def read_both_ways(path: Path, sentence: str) -> tuple[int, list[str]]:
    """Refuse with a sentence, skip with the same; how many rows are left, and what was skipped."""
    with pytest.raises(ValueError, match=sentence):
        TableTask(str(path), {"prompt": "prompt", "completion": "completion"})
    task = TableTask(str(path), {"prompt": "prompt", "completion": "completion"}, bad_rows="skip")
    listed = task.notes["skipped_list"]
    assert len(listed) == task.notes["skipped_rows"] and re.search(sentence, listed[0])
    return sum(len(task.examples(split)) for split in ("train", "validation", "test")), listed


HALF = {
    "prompt": {"prompt": "\ud800", "completion": "x"},
    "completion": {"prompt": "p", "completion": "a\udfff"},
    "turn": {"prompt": [{"role": "user", "content": "\ud800"}], "completion": "x"},
}


@pytest.mark.parametrize("row", HALF.values(), ids=HALF.keys())
def test_half_a_character_is_a_bad_row(tmp_path, row):
    """JSON's escapes can hold a lone surrogate, which no tokenizer takes."""
    good = [{"prompt": f"word {i}", "completion": "\U0001f600"} for i in range(6)]
    path = Path(write(tmp_path / "rows.jsonl", [*good[:3], row, *good[3:]]))
    assert read_both_ways(path, r"rows\.jsonl:4: task\.columns\.(prompt|completion)=\1 is no text in UTF-8")[0] == 6


def test_half_a_character_in_a_column_name_is_a_bad_row(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl", [{"prompt": f"w {i}", "completion": "x"} for i in range(4)] + [{"\ud800": 1}]))
    assert read_both_ways(path, r"rows\.jsonl:5: the name of column '\\ud800' is no text")[0] == 4


def cells(n: int) -> list[bytes]:
    return [b"prompt,completion", *(b"word %d,x" % i for i in range(2, n + 2))]


BYTES = {
    "latin_1": (b"caf\xe9,x", "prompt"),
    "utf_16": ("word,x".encode("utf-16-le"), "prompt"),
    "nul": (b"word,\0\0", "completion"),
    "half_a_character": (b"word,\xed\xa0\x80", "completion"),
}


@pytest.mark.parametrize(("line", "column"), BYTES.values(), ids=BYTES.keys())
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_bytes_that_are_no_text_cost_their_csv_row_alone(tmp_path, line, column, mark, end):
    """Beyond the first block that is read, too."""
    lines = cells(3000)
    lines[2500] = line
    (tmp_path / "rows.csv").write_bytes(mark + end.join(lines))
    left, listed = read_both_ways(tmp_path / "rows.csv", rf"rows\.csv:2501: the column '{column}' has bytes that are no text")
    assert left == 2999 and len(listed) == 1


@pytest.mark.parametrize("bad", [b'{"prompt": "caf\xe9"}', b'{"prompt": "a\0b"}', '{"prompt": "a"}'.encode("utf-16-le"), b"\0"])
def test_bytes_that_are_no_text_cost_their_json_line_alone(tmp_path, bad):
    lines = [json.dumps({"prompt": f"word {i}", "completion": "x"}).encode() for i in range(3000)]
    lines[2500] = bad
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    assert read_both_ways(tmp_path / "rows.jsonl", r"rows\.jsonl:2501: not JSON in UTF-8")[0] == 2999


FILES = {
    "open_quote": (b'word 6,"x', r"rows\.csv:6: no CSV \(unexpected end of data\); close the quote that opens here"),
    "text_behind_a_quote_that_closes_late": (b'"word 6,x\nword,"x"', r"rows\.csv:6: no CSV .*close the quote"),
}


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
@pytest.mark.parametrize(("line", "sentence"), FILES.values(), ids=FILES.keys())
def test_an_open_quote_swallows_no_rows(tmp_path, line, sentence, bad_rows):
    """Where rows begin behind it cannot be told, so the file is refused, with the line where the quote opens."""
    lines = cells(40)
    lines[5] = line
    (tmp_path / "rows.csv").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=sentence):
        TableTask(str(tmp_path / "rows.csv"), {"prompt": "prompt"}, bad_rows=bad_rows)


LINES = {
    "quote_within_a_line": (b'"word"6,x', r"rows\.csv:6: no CSV"),
    "too_few": (b"word", r"rows\.csv:6: has 1 cells for 2 columns, none for 'completion'; quote a text with commas"),
    "too_many": (b"word,x,y", r"rows\.csv:6: has 3 cells for 2 columns, more behind 'completion'; quote"),
    "several_lines": (b'"two\nlines"', r"rows\.csv:6: has 1 cells for 2 columns, none for 'completion' \(in 2 lines\)"),
}


@pytest.mark.parametrize(("line", "sentence"), LINES.values(), ids=LINES.keys())
def test_a_malformed_csv_row_is_named_and_costs_itself(tmp_path, line, sentence):
    lines = cells(40)
    lines[5] = line
    (tmp_path / "rows.csv").write_bytes(b"\n".join(lines))
    left, listed = read_both_ways(tmp_path / "rows.csv", sentence)
    assert left == 39 and len(listed) == 1


def test_rows_of_several_lines_and_blank_lines_are_csv(tmp_path):
    (tmp_path / "rows.csv").write_text('\nprompt,completion,,\n\n"two\nlines ""said""","a, b",,\nx,y,,\n')
    rows = read_rows(str(tmp_path / "rows.csv"))
    assert [place for place, _ in rows] == ["rows.csv:4", "rows.csv:6"]
    assert rows[0][1]["prompt"] == 'two\nlines "said"' and rows[0][1]["completion"] == "a, b"


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b"prompt,a,prompt", r"rows\.csv:1: the header has the column 'prompt' twice; rename one"),
        ("prompt,a".encode("utf-16"), r"rows\.csv:1: the header has bytes that are no text .*save the file as UTF-8"),
    ],
)
def test_a_header_that_is_none_refuses_the_file(tmp_path, header, sentence, bad_rows):
    (tmp_path / "rows.csv").write_bytes(header + b"\n1,2,3\n")
    with pytest.raises(ValueError, match=sentence):
        TableTask(str(tmp_path / "rows.csv"), {"prompt": "prompt"}, bad_rows=bad_rows)


def test_the_later_of_two_equal_ids_is_skipped_and_listed(tmp_path):
    rows = [{"prompt": f"word {i}", "name": f"n{i % 5}"} for i in range(6)]
    task = TableTask(write(tmp_path / "rows.jsonl", rows), {"prompt": "prompt", "id": "name"}, bad_rows="skip")
    assert task.notes["skipped_rows"] == 1
    assert "rows.jsonl:6: task.columns.id=name is 'n0' as in rows.jsonl:1; give" in task.notes["skipped_list"][0]
    kept = {e.id: e.messages[0]["content"] for s in ("train", "validation", "test") for e in task.examples(s)}
    assert len(kept) == 5 and kept["n0"] == "word 0"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1] + b"x", lambda b: b[: len(b) // 2], lambda b: b[:-20] + b"\xff" * 12 + b[-8:]]
)
def test_a_damaged_parquet_file_is_refused_in_a_sentence(tmp_path, damage):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(damage((tmp_path / "rows.parquet").read_bytes()))
    with pytest.raises(ValueError, match=r"rows\.parquet: no parquet table \(.*\); write or copy it again"):
        TableTask(str(tmp_path / "rows.parquet"), COLUMNS)


def test_a_verdict_that_is_not_there_in_time_is_wrong(file):
    """A model's text must not hang a run; what had set an alarm before has it again."""
    task = TableTask(file, COLUMNS, verifier=Regex(r"(a+)+b"), verify_seconds=0.2)
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        begun = time.monotonic()
        assert task.verify(task.examples("train")[0], "a" * 60) == Verdict(0.0)
        assert time.monotonic() - begun < 5 and signal.getitimer(signal.ITIMER_REAL)[0] > 50
        assert signal.getsignal(signal.SIGALRM).__name__ == "<lambda>"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    answer = task.examples("train")[0].extra["answer"]
    right = TableTask(file, COLUMNS, verifier=Regex(r"\d+"), verify_seconds=5)
    assert right.verify(right.examples("train")[0], f"So {answer}") == Verdict(1.0, 1.0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_verifier_that_catches_everything_is_stopped_too_and_may_wait_longer_itself(file):
    late = TableTask(file, COLUMNS, verifier=Function("tests.test_tasks.asleep"), verify_seconds=0.2)
    assert late.verify(late.examples("train")[0], "x") == Verdict(0.0)
    patient = type("Patient", (), {"seconds": 30.0, "__call__": lambda self, completion, answer: Verdict(1.0)})()
    with pytest.raises(ValueError, match=r"task\.verify_seconds=10\.0 must exceed 30\.0, .*null waits"):
        TableTask(file, COLUMNS, verifier=patient)
    assert TableTask(file, COLUMNS, verifier=patient, verify_seconds=None).splits


def asleep(completion: str, answer: str) -> bool:
    time.sleep(30)
    return True


def test_outside_the_main_thread_verdicts_have_no_limit(file):
    task = TableTask(file, COLUMNS, verifier=Function("tests.test_tasks.nap"), verify_seconds=0.05)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(task.verify, task.examples("train")[0], "x").result() == Verdict(1.0)


def nap(completion: str, answer: str) -> bool:
    time.sleep(0.2)
    return True


def test_math_keeps_its_own_alarm_inside_the_limit(file):
    pytest.importorskip("math_verify")
    task = TableTask(file, COLUMNS, verifier=Math())
    example = task.examples("train")[0]
    before = signal.getsignal(signal.SIGALRM)
    assert task.verify(example, f"\\boxed{{{example.extra['answer']}}}") == Verdict(1.0, 1.0)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
