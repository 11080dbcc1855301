"""Rows as other programs write them: taken as they are meant, or refused by a sentence; and every row through the template."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.check import examine
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluate import evaluate
from opd_lightning.models import stand_in
from opd_lightning.preflight.data import long_prompts
from opd_lightning.preflight.rendering import check_rows, rendering_errors
from opd_lightning.tasks.chats import chat, learning, replies
from opd_lightning.tasks.splits import key_of
from opd_lightning.tasks.table import TableTask
from opd_lightning.teachers.contexts import NoContext, PrivilegedContext
from opd_lightning.training.run import run
from opd_lightning.types import Example

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Porto"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}


def task(tmp_path, rows: list, columns: dict | None = None, suffix: str = ".jsonl", **options) -> TableTask:
    """A table of these rows, with as many others beside them as splits need."""
    path = tmp_path / f"rows{suffix}"
    text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else "\n".join(rows)
    path.write_text(text)
    return TableTask(str(path), columns or {}, **options)


TAKEN = {
    "plain": ("Hi", [USER], None),
    "chat": ([SYSTEM, USER, {"role": "assistant", "content": "Yo"}], [SYSTEM, USER], "Yo"),
    "one_turn": (USER, [USER], None),
    "sharegpt": (
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
        [SYSTEM, USER],
        "Yo",
    ),
    "sharegpt_tools": (
        [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Porto"}}'},
            {"from": "observation", "value": "rain"},
        ],
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Porto"}}}],
            },
            {"role": "tool", "content": "rain"},
        ],
        None,
    ),
    **{
        f"calls_{kind}": (
            [USER, {"role": "assistant", "content": "", "tool_calls": calls}, RESULT],
            [
                USER,
                {"role": "assistant", "content": ""}
                | {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Porto"}}}]},
                RESULT,
            ],
            None,
        )
        for kind, calls in {
            "flat": [{"name": "weather", "arguments": {"town": "Porto"}}],
            "text": '[{"function": {"name": "weather", "arguments": {"town": "Porto"}}}]',
            "texts": ['{"name": "weather", "arguments": {"town": "Porto"}}'],
            "one": {"type": "function", "function": {"name": "weather", "arguments": {"town": "Porto"}}},
        }.items()
    },
    "no_calls": ([USER, {"role": "assistant", "content": "Yo", "tool_calls": "[]"}], [USER], "Yo"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}], [USER], None),
    "developer": ([{"role": "developer", "content": "Be brief."}, USER], [SYSTEM, USER], None),
    "function_role": (
        [USER, {"role": "assistant", "content": None, "function_call": {"name": "weather"}}, RESULT | {"role": "function"}],
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather"}}]},
            RESULT,
        ],
        None,
    ),
    "tool_calls": (
        [USER, CALLS, RESULT, {"role": "assistant", "content": "Rain."}],
        [USER, CALLS | {"content": ""}, RESULT],
        "Rain.",
    ),
    "nulls_of_a_table": ([USER | {"tool_calls": None, "name": None}], [USER], None),
    "empty_reply": ([USER, {"role": "assistant", "content": " "}], [USER], None),
    "json": (json.dumps([SYSTEM, USER, {"role": "assistant", "content": "Yo"}]), [SYSTEM, USER], "Yo"),
    "json_sharegpt": (json.dumps({"conversations": [{"from": "human", "value": "Hi"}]}), [USER], None),
    "json_of_something_else": (
        '[{"role": "admin", "name": "x"}]',
        [{"role": "user", "content": '[{"role": "admin", "name": "x"}]'}],
        None,
    ),
    "brackets": ("[1, 2] is what?", [{"role": "user", "content": "[1, 2] is what?"}], None),
}


@pytest.mark.parametrize(("prompt", "messages", "answered"), TAKEN.values(), ids=TAKEN.keys())
def test_chats_are_taken_as_they_are_meant(prompt, messages, answered):
    prompt, reference = learning(chat(prompt, "r:1"), [], "last", "r:1")
    assert prompt == messages and (reference[0]["content"] if reference else None) == answered


REFUSED = {
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        r"r:1: .* a part that is no text \(image_url\)",
    ),
    "null": ([USER, {"role": "assistant", "content": None}], r"r:1: a turn of the chat is .*'content': None"),
    "role": ([{"role": "narrator", "content": "x"}], r"r:1: a turn of the chat is .*narrator"),
    "number": ([{"role": "user", "content": 3}], r"r:1: a turn of the chat is"),
    "call_that_is_none": (
        [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "weather()"}],
        r"r:1: a call is 'weather",
    ),
    "python": (str([USER]), r"r:1: .* looks like a chat and is no JSON .* json\.dumps"),
    "cut": ('[{"role": "user", "content": "Hi"}, {"role": ]', r"r:1: .* looks like a chat and is no JSON"),
    "half_a_character": (r'[{"role": "user", "content": "\ud800"}]', r"r:1: the chat is no text in UTF-8"),
    "preference": (
        [USER, {"role": "assistant", "content": "Yo"}],
        r"the completion is a chat of user, assistant, which begins or ends with no turn",
    ),
}


@pytest.mark.parametrize(("given", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_lost_is_refused_with_its_row(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        replies(given, "completion", "r:1") if "completion is" in sentence else chat(given, "r:1")


def test_completions_may_be_a_turn_of_the_assistant(tmp_path):
    """TRL's conversational prompt and completion; a demonstration likewise."""
    yo = [{"role": "assistant", "content": [{"type": "text", "text": "Yo"}]}]
    rows = [{"prompt": [USER, {"role": "user", "content": str(i)}], "completion": yo, "why": json.dumps(yo)} for i in range(4)]
    example = task(tmp_path, rows, {"completion": "completion", "demonstration": "why"}).examples("train")[0]
    assert example.completion == example.demonstration == example.solution == "Yo" and example.messages[0] == USER
    rows = [row | {"completion": [CALLS]} for row in rows]
    calling = task(tmp_path, rows, {"completion": "completion"}).examples("train")[0]
    assert calling.turns == [CALLS | {"content": ""}] and calling.completion is None and "Porto" in calling.demonstration


def test_the_prompt_column_is_found_by_itself(tmp_path):
    for column in ("messages", "conversations", "prompt"):
        rows = [
            {"id": i, column: [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo"}]}
            for i in range(4)
        ]
        assert task(tmp_path, rows).examples("train")[0].completion == "Yo"
        assert task(tmp_path, rows, {"prompt": None, "id": "id"}).examples("train")
    with pytest.raises(
        ValueError, match=r"no column is called prompt, messages, conversations or question; columns are title, text\."
    ):
        task(tmp_path, [{"title": "x", "text": "y"}])
    with pytest.raises(ValueError, match=r"preferences, of which no method here learns; task.columns.prompt=chosen"):
        task(tmp_path, [{"chosen": [USER], "rejected": [USER]}])
    cells = [
        "messages",
        *(json.dumps(json.dumps([{"role": "user", "content": f"a{i}"}])).replace('\\"', '""') for i in range(4)),
    ]
    assert task(tmp_path, cells, suffix=".csv").examples("train")[0].messages[0]["content"].startswith("a")


def test_two_answers_or_two_system_prompts_are_refused(tmp_path):
    row = {"prompt": [SYSTEM, USER, {"role": "assistant", "content": "Yo"}], "completion": "No", "rules": "Rhyme."}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*give two completions"):
        task(tmp_path, [row], {"completion": "completion"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*give two system prompts"):
        task(tmp_path, [row], {"system": "rules"})


def test_columns_that_nobody_reads_are_said(tmp_path):
    rows = [
        {"messages": [USER, {"role": "user", "content": str(i)}], "functions": [{"name": "weather"}] if i else []}
        for i in range(4)
    ]
    made = task(tmp_path, rows)
    assert "the column 'functions' has something in 3 rows and plays no part" in made.notes["warnings"][0]
    assert "warnings" not in task(tmp_path, rows, {"prompt": "{messages[1][content]} {functions}"}).notes
    assert "warnings" not in task(tmp_path, rows, {"tools": "functions"}).notes


def test_prompts_that_differ_in_their_calls_are_not_the_same():
    def key(arguments: str) -> str:
        call = {"function": {"name": "weather", "arguments": arguments}}
        return key_of(Example("x", [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT]))

    assert key("Porto") == key("Porto") != key("Faro")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "gpt", "system", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "tool_calls", "function_call", "type", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_is_a_chat_or_a_clear_refusal(value):
    """As it is, and as JSON text; what is taken has text for a content."""
    for given_value in (value, json.dumps(value)):
        for read in (lambda v: chat(v, "r:1"), lambda v: replies(v, "completion", "r:1")):
            try:
                found = read(given_value)
            except ValueError as error:
                assert "r:1" in str(error)
                continue
            assert all(isinstance(turn["content"], str) for turn in found)
            if found:
                key_of(Example("x", found))


ALTERNATE = (
    "{% for m in messages %}{% if loop.index0 > 0 and m['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def strict(tmp_path_factory) -> ChatRenderer:
    tokenizer = stand_in.tokenizer()
    tokenizer.chat_template = ALTERNATE
    return ChatRenderer(tokenizer)


def twice(n: int, bad: int) -> list[dict]:
    """Rows of which one has two user turns in a row."""
    return [
        {
            "messages": [
                *([USER] if i == bad else []),
                {"role": "user", "content": f"n {i}"},
                {"role": "assistant", "content": "ok"},
            ]
        }
        for i in range(n)
    ]


def test_a_row_that_the_template_refuses_is_named_or_left_out(tmp_path, strict):
    plain = {"student": NoContext()}
    with pytest.raises(
        ValueError, match=r"example rows.jsonl:18: .*roles must alternate.* task.bad_rows=skip leaves such rows out"
    ):
        check_rows(task(tmp_path, twice(20, 17)), strict, plain)
    for heldout in (False, True):  # rows that are held out are rendered too, later, by evaluations
        path = tmp_path / "test.jsonl"
        path.write_text(
            "\n".join(map(json.dumps, [{"messages": [USER, USER]}, {"messages": [{"role": "user", "content": "ok"}]}]))
        )
        made = task(
            tmp_path, twice(20, -1 if heldout else 17), bad_rows="skip", heldout={"path": str(path)} if heldout else None
        )
        before = sum(len(made.examples(split)) for split in ("train", "validation", "test"))
        check_rows(made, strict, plain)
        assert sum(len(made.examples(split)) for split in ("train", "validation", "test")) == before - 1
        assert made.notes["skipped_rows"] == 1 and "roles must alternate" in made.notes["skipped_list"][0]
    with pytest.raises(ValueError, match="leaves no training example, the first for this"):
        check_rows(
            task(tmp_path, [{"messages": [USER, {"role": "user", "content": str(i)}]} for i in range(6)], bad_rows="skip"),
            strict,
            plain,
        )


def test_what_only_a_teacher_reads_is_rendered_too(strict):
    """Its context's options may choose another part of the template."""
    strict = ChatRenderer(strict.tokenizer)
    strict.tokenizer.chat_template = "{% if deep %}{{ raise_exception('not deep') }}{% endif %}" + ALTERNATE
    examples = [Example("a", [USER], demonstration="x"), Example("b", [USER])]
    teacher = PrivilegedContext("demonstration", "{prompt} {demonstration}", template_options={"deep": True})
    found = rendering_errors(examples, strict, {"student": NoContext(), "teacher": teacher})
    assert (
        list(found) == ["a"] and "the teacher's prompt of example a: " in found["a"]
    )  # b lacks what it quotes: another check's


LOSSY = {
    "calls": (ALTERNATE, [USER, CALLS | {"content": ""}, RESULT], "its tool calls"),
    "content_beside_calls": (
        "{% for m in messages %}{{ m['role'] }}{{ m['tool_calls'] if m['tool_calls'] else m['content'] }}{% endfor %}",
        [USER, CALLS | {"content": "Let me see."}, RESULT],
        "'Let me see.' beside its tool calls",
    ),
    "tool_turns": (
        "{% for m in messages if m['role'] != 'tool' %}{{ m['role'] }}{{ m['content'] }}{{ m['tool_calls'] }}{% endfor %}",
        [USER, CALLS | {"content": ""}, RESULT],
        "its tool turn 'rain'",
    ),
    "system_of_a_later_row": (
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}{{ m['content'] }}{% endfor %}",
        [SYSTEM, USER],
        "its system turn 'Be brief.'",
    ),
}


@pytest.mark.parametrize(("template", "messages", "lost"), LOSSY.values(), ids=LOSSY.keys())
def test_what_the_template_leaves_out_is_said(template, messages, lost):
    tokenizer = stand_in.tokenizer()
    tokenizer.chat_template = template
    found = rendering_errors([Example("a", [USER]), Example("b", messages)], ChatRenderer(tokenizer), {"student": NoContext()})
    assert list(found) == ["b"] and f"lacks {lost}" in found["b"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{{ m['tool_calls'] }}{% endfor %}"
    assert not rendering_errors([Example("b", messages)], ChatRenderer(tokenizer), {"student": NoContext()})


def test_calls_count_in_the_length_of_a_prompt():
    tokenizer = stand_in.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }}{% endfor %}"
    )
    calls = CALLS | {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "x" * 500}}]}
    examples = [Example("a", [USER]), Example("b", [USER, calls, RESULT])]
    assert [e.id for e, _ in long_prompts(examples, ChatRenderer(tokenizer), NoContext(), 400)] == ["b"]


def alternating(small, tmp_path: Path, *more: str):
    """A run on rows of the embedded world of which one is refused by the template."""
    (tmp_path / "alternate.jinja").write_text(ALTERNATE.replace("<|start|>", "").replace("<|end|>\n", "\n"))
    rows = [
        {
            "messages": [*([USER] if i == 11 else []), {"role": "user", "content": f"copy {i % 10} {i // 10}"}],
            "completion": "answer 1",
        }
        for i in range(20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = ["task=table", f"task.path={path}", "task.columns.completion=completion", "task.max_new_tokens=8"]
    return small("method=sft", "~task.n_train", *table, f"model.chat_template={tmp_path}/alternate.jinja", *more)


def test_check_and_run_find_the_row_before_training(small, tmp_path):
    found = examine(alternating(small, tmp_path), fast=True)
    assert any(f.state == "fail" and f.name == "data" and "example rows.jsonl:12" in f.text for f in found)
    with pytest.raises(ValueError, match=r"example rows.jsonl:12: .*roles must alternate"):
        run(alternating(small, tmp_path))
    folder = run(alternating(small, tmp_path, "task.bad_rows=skip", "trainer.max_steps=1", "evaluation=none"))
    data = json.loads((folder / "status.json").read_text())["data"]
    assert data["skipped_rows"] == 1 and "rows.jsonl:12" in data["skipped_list"][0]
    with pytest.raises(ValueError, match=r"example rows.jsonl:12: .*roles must alternate"):
        evaluate(alternating(small, tmp_path, "logits_chunk_size=256"))
