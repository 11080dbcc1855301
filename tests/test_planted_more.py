"""More planted faults: ends of replies that differ behind one template, and templates that change texts."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from opd_lightning.config import compose
from opd_lightning.config.overrides import explain
from opd_lightning.models import Pretrained
from opd_lightning.models.ends import exchange_rows
from tests.planted import CHATML, Folders, expect, found, sft, template

pytestmark = pytest.mark.usefixtures("no_logs")


def base_and_chat(folders: Folders) -> list[str]:
    """A base model that ends with its own EOS, and its chat sibling, both with the template of the latter."""
    base = template(folders, CHATML, eos_token="<|pad|>")
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    (Path(base) / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return ["method=opd", f"model.path={base}", f"teacher.path={folders.bytes}"]


def test_ends_that_differ_behind_one_template_are_refused_or_made_one(folders):
    pair = base_and_chat(folders)
    expect(found(folders, *pair), r"fail teacher's replies: the student really ends replies with '<\|pad\|>'.*'<\|end\|>'")
    expect(found(folders, *pair, "model.end_token=<|pad|>"), r"warn teacher's replies: .*is counted for '<\|pad\|>'")
    said = found(folders, *pair, "model.end_token=<|end|>")
    assert "teacher's replies" not in said
    expect(said, r"warn replies: .*rollouts stop at no other token; .*begin with SFT")


def test_an_exchanged_end_changes_the_output_and_not_the_reading(folders):
    lm, other = (Pretrained(folders.tiny).model() for _ in range(2))
    exchange_rows(other, 3, 5)
    ids = torch.tensor([[1, 3, 5, 7]])
    expected = lm(ids).logits[..., [5, 3]]
    assert torch.equal(other(ids).logits[..., [3, 5]], expected)


R1 = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
UPPER = CHATML.replace("{{ m.content }}", "{{ m.content | upper if m.role == 'assistant' else m.content }}")
NO_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
CHANGED = {
    "thought": (
        R1,
        {"prompt": "x", "completion": "<think>hm</think>y"},
        r"fail replies: .* the text of [1-6] of \d+ references",
    ),
    "upper": (UPPER, {"prompt": "x", "completion": "yes"}, r"fail replies: .*changes the text of \d+ of \d+ references"),
    "cut": (
        CHATML.replace("m.content", "m.content[:9]"),
        {"prompt": "a" * 10, "completion": "y"},
        "warn replies: .*user's text",
    ),
    "no prompt": (NO_PROMPT, {"prompt": "x", "completion": "y"}, r"fail replies: .*writes '<\|start\|>assistant"),
    "trim": (
        CHATML.replace("m.content", "m.content | trim"),
        {"prompt": " x", "completion": " y "},
        "pass replies: prompt and reference have",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_templates_that_change_texts_are_found(folders, name):
    text, row, sentence = CHANGED[name]
    rows = [row | {"prompt": f"{row['prompt']}{i}"} for i in range(6)]  # some are held out
    expect(found(folders, *sft(folders, text, *rows)), sentence)


def test_a_mapping_with_a_column_that_no_example_has_is_named():
    word = "task.columns={prompt: p, images: i}"
    assert "models here read text alone" in str(explain(["task=table", word]))
    with pytest.raises(ValueError, match="read text alone"):
        compose(["task=table", word])


def test_a_literal_interpolation_is_shown_as_it_is_written():
    told = str(explain(["task=table", "task.system=$HOME ${x}"]))
    assert "there is no key x to fill in ${x} with" in told
    (literal,) = shlex.split(told.rpartition("a literal one is ")[2].removesuffix("."))
    assert explain(["task=table", literal]) is None
    assert compose(["task=table", literal]).task.system == "$HOME ${x}"


def test_a_template_that_is_no_jinja_is_called_so(folders):
    said = found(folders, *sft(folders, "{% for m in messages %}{{ m.content }}"))
    assert "is no Jinja" in said and "refuses a chat" not in said
