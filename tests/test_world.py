"""The embedded world: disjoint splits, a verifier that tells content from style, and models that have the skills."""

import importlib.resources
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluation import GreedyAccuracy
from opd_lightning.generation import TransformersGenerator
from opd_lightning.models import Pretrained, Student
from opd_lightning.toy.world import (
    N_INPUTS,
    OPERATIONS,
    SPLITS,
    STYLES,
    UNSEEN,
    VOCABULARY,
    WorldTask,
    input_at,
    world_tokenizer,
    write,
)

TASK = WorldTask()
FIRST = TASK.examples("train")[0]


def test_splits_partition_the_inputs():
    ranges = sorted(SPLITS.values())
    assert ranges[0][0] == 0 and ranges[-1][1] == N_INPUTS
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert len({input_at(p) for p in range(N_INPUTS)}) == N_INPUTS


def test_no_prompt_is_in_two_splits():
    prompts = {split: {e.messages[0]["content"] for e in TASK.examples(split)} for split in ("train", "validation", "test")}
    assert not prompts["train"] & prompts["validation"] and not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_examples_name_their_skill():
    assert {e.skill for e in TASK.examples("train")} == {"new"}
    skills = [e.skill for e in TASK.examples("test")]
    assert skills.count("new") == 256 and skills.count("prior/sort") == 64


@pytest.mark.parametrize("style", STYLES)
def test_content_is_right_in_any_style_and_style_is_native_only(style):
    for example in TASK.examples("validation")[:50]:
        verdict = TASK.verify(example, write(tuple(map(int, example.extra["digits"])), style))
        assert verdict.content == 1.0 and verdict.format == float(style == "native")


def test_a_wrong_digit_is_wrong_content_in_native_style():
    example = TASK.examples("validation")[0]
    right = [int(d) for d in example.extra["digits"]]
    verdict = TASK.verify(example, write(((right[0] + 1) % 10, *right[1:]), "native"))
    assert verdict.content == 0.0 and verdict.format == 1.0


@given(st.text(max_size=60))
def test_no_text_makes_the_verifier_raise(text):
    verdict = TASK.verify(FIRST, text)
    assert verdict.content in (0.0, 1.0) and verdict.format in (0.0, 1.0)


@given(st.lists(st.sampled_from(VOCABULARY[2:-1]), min_size=1, max_size=30))
def test_the_tokenizer_gives_every_text_of_the_language_back(words):
    tokenizer = world_tokenizer()
    text = " ".join(words)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_ends_where_the_answer_begins():
    messages = [{"role": "user", "content": "rotate 1 2 3 4 5"}]
    assert world_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "rotate 1 2 3 4 5 ="


@pytest.mark.parametrize(("name", "value"), [("skill", "copy"), ("style", "loud"), ("n_train", 0), ("n_eval", 10**6)])
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"task\.{name}="):
        WorldTask(**{name: value})


@pytest.mark.parametrize(("model", "new"), [("start", (0.0, 0.1)), ("teacher", (0.95, 1.0))])
def test_the_shipped_models_have_the_skills_they_are_shipped_for(model, new):
    """The numbers that made.json claims, on other prompts."""
    path = f"pkg://opd_lightning/toy/assets/world/{model}"
    pretrained = Pretrained(path)
    tokenizer, student = pretrained.tokenizer(), Student(pretrained.model())
    generator = TransformersGenerator(tokenizer)
    generator.update_weights(student, 0)
    scores = GreedyAccuracy(WorldTask(n_eval=128), ChatRenderer(tokenizer), 12)(student, {}, generator)
    assert new[0] <= scores["new/accuracy"].value <= new[1]
    assert scores["prior/accuracy"].value > 0.98 and scores["prior/format"].value > 0.99
    made = json.loads(importlib.resources.files("opd_lightning").joinpath(f"toy/assets/world/{model}/made.json").read_text())
    assert made["tolerant"] and made["validation"]["new/demonstrated"] > 0.98


def test_operations_are_what_their_names_say():
    digits = (3, 1, 4, 1, 5)
    expected = {"copy": digits, "reverse": (5, 1, 4, 1, 3), "increment": (4, 2, 5, 2, 6), "sort": (1, 1, 3, 4, 5)}
    expected |= {"rotate": (1, 4, 1, 5, 3), "swap": (1, 3, 1, 4, 5), "complement": (6, 8, 5, 8, 4), "descend": (5, 4, 3, 1, 1)}
    assert {name: operation(digits) for name, operation in OPERATIONS.items()} == expected and len(UNSEEN) == 4
