"""References and the token limit: the limit follows the data, and what is cut is counted before training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from opd_lightning.check import examine
from opd_lightning.config import plain
from opd_lightning.config.compatibility import check
from opd_lightning.config.limits import limited
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.models import stand_in
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.references import drop_long, limit_for, long_references, longest_reference, references
from opd_lightning.training.run import other_evaluation, run
from opd_lightning.types import Example, SamplingParams


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    """A token for each byte."""
    return ChatRenderer(stand_in.tokenizer())


def example(name: str, length: int | None, prompt: str = "hi") -> Example:
    return Example(name, [{"role": "user", "content": prompt}], completion=None if length is None else "x" * length)


def found(renderer: ChatRenderer, lengths: list[int], limit: int, **rollout):
    """The result on references of these lengths, ends included."""
    writer = SimpleNamespace(reads_references=True, sampling=SamplingParams(limit), **rollout)
    model = SimpleNamespace(window=lambda: 1024)
    examples = [example(f"r:{i}", n - 1) for i, n in enumerate(lengths)]
    (one,) = references(SimpleNamespace(rollout=writer, renderer=renderer, examples=examples, model=model))
    return one


def test_cut_references_are_counted_and_the_limit_that_fits_is_said(renderer):
    assert found(renderer, [10, 128], 128).state == "pass"
    some = found(renderer, [*[10] * 197, 129, 300, 412], 128)
    assert some.state == "warn" and some.text.startswith("3 of 200 references (1.5%) are longer than")
    assert "the longest has 412 tokens (example r:199)" in some.text
    assert "task.max_new_tokens=129 fits 99 %, 412 all (the model reads 1024 at once)" in some.text
    every = found(renderer, [300, 301], 128)
    assert "2 of 2 references (100.0%)" in every.text and "none teaches how a reply ends" in every.text


def test_a_mixture_has_the_limit_of_its_other_writer(renderer):
    other = SimpleNamespace(sampling=SamplingParams(64))
    assert "max_new_tokens=64" in found(renderer, [100], 128, other=other).text


@pytest.mark.parametrize(
    ("lengths", "prompt", "window", "limit"),
    [
        ([10, 127], "hi", 4096, 128),  # as without references
        ([10, 300], "hi", 4096, 301),
        ([10, 3000], "p" * 500, 2048, "what the prompt leaves"),
        ([10, 300], "p" * 300, 400, 301),  # such a prompt is refused or dropped, and does not count
        ([None], "hi", 4096, 128),
        ([None], "hi", 64, "what the prompt leaves"),
        ([10], "hi", 64, "what the prompt leaves"),  # short ones leave a small window room for the prompt
    ],
)
def test_the_limit_follows_the_references(renderer, lengths, prompt, window, limit):
    examples = [example(str(i), n, prompt) for i, n in enumerate(lengths)]
    task = SimpleNamespace(examples=lambda split: examples if split == "train" else [])
    rendered = len(renderer.render(examples[0].messages).token_ids)
    assert limit_for(task, renderer, window) == (window - rendered if isinstance(limit, str) else limit)


def test_only_those_that_could_be_long_are_tokenized(renderer, monkeypatch):
    asked = []
    real = ChatRenderer.reply
    monkeypatch.setattr(ChatRenderer, "reply", lambda self, text, chat=None: asked.append(text) or real(self, text, chat))
    examples = [example(str(n), n) for n in (5, 50, 500)]
    assert long_references(examples, renderer, 100) == {"500": 501} and longest_reference(examples, renderer) == 501
    assert [len(text) for text in asked] == [500, 500]
    assert longest_reference([example("x", None)], renderer) == 0


def test_long_ones_can_be_dropped(renderer):
    examples = [example("short", 5), example("long", 500)]
    assert [e.id for e in drop_long(examples, renderer, 100)] == ["short"]
    with pytest.raises(ValueError, match=r"leaves none of the 1 .* longer than max_new_tokens=100, the longest has 501; raise"):
        drop_long(examples[1:], renderer, 100)


def test_open_limits_are_filled_and_others_stay():
    cfg = OmegaConf.create(
        {"task": {"max_new_tokens": None}, "a": {"max_new_tokens": "${task.max_new_tokens}"}, "b": [{"max_new_tokens": 3}]}
    )
    assert plain(limited(cfg, 7)) == {"task": {"max_new_tokens": 7}, "a": {"max_new_tokens": 7}, "b": [{"max_new_tokens": 3}]}
    assert cfg.task.max_new_tokens is None and limited(limited(cfg, 7), 9).a.max_new_tokens == 7


def answers(small, tmp_path: Path, length: int, *more: str, n: int = 12):
    """A run on a table whose references are so long, but for every third."""
    rows = [{"prompt": f"n {i}", "completion": "x" * (5 if i % 3 == 0 else length)} for i in range(n)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = ["task=table", f"task.path={path}", "task.columns.completion=completion", "evaluation.every=1"]
    return small("~task.n_train", "model.path=stand-in://qwen3", "model.teacher=stand-in://qwen3/1", *table, *more)


@pytest.mark.parametrize("method", ["sft", "gkd", "opd"])
def test_every_limit_of_a_run_follows_the_data(small, tmp_path, method):
    """Also where nobody imitates the references: they say how long an answer is."""
    cfg = answers(small, tmp_path, 300, f"method={method}")
    assert not any("max_new_tokens" in warning for warning in check(cfg))
    parts = assemble(cfg, None)
    assert parts.task.max_new_tokens == parts.rollout.sampling.max_new_tokens == 301
    assert parts.suite["accuracy"].sampling.max_new_tokens == 301
    assert parts.preflight()["train"] == 10


def test_a_run_cuts_no_reference_by_default(small, tmp_path):
    few = ("evaluation.suite.accuracy.max_new_tokens=4", "evaluation.answers.max_new_tokens=4")
    cfg = answers(small, tmp_path, 300, "method=sft", "trainer.max_steps=1", *few)
    folder = run(cfg)
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    cut = [row[header.index("rollout/truncated")] for row in rows]
    assert {float(value) for value in cut if value} == {0.0}
    assert OmegaConf.load(folder / "config.yaml").rollout.sampling.max_new_tokens == 301
    assert OmegaConf.load(folder / "config.yaml").evaluation.suite.teacher.max_new_tokens == 301
    assert not list(other_evaluation(cfg, folder))  # the number in the record is what null stood for


def test_check_and_run_warn_of_a_limit_that_cuts(small, tmp_path, caplog):
    short = ("method=sft", "task.max_new_tokens=128")
    warned = [f.text for f in examine(answers(small, tmp_path, 300, *short), fast=True) if f.name == "references"]
    assert len(warned) == 1 and "of 10 references" in warned[0] and "task.max_new_tokens=301 fits all" in warned[0]
    dropped = assemble(answers(small, tmp_path, 300, *short, "data.overlong=drop"), None)
    assert dropped.preflight()["dropped"] == 10 - len(dropped.examples) and len(dropped.examples) in (2, 3, 4)
    run(answers(small, tmp_path, 300, *short, "trainer.max_steps=1", "evaluation=none"))
    assert "are cut there" in caplog.text
