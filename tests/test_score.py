"""Scores that were written to files teach what the live teacher teaches."""

import json
import logging
import re

import pytest
import torch
from conftest import save_tiny

from opd_lightning.data.score_files import ScoreFiles, key_of
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.score import make, write
from opd_lightning.score.__main__ import main
from opd_lightning.score.make import score
from opd_lightning.training.run import run

TOPK = ("loss/vocab_support=topk", "loss.vocab_support.k=8")


def losses(folder):
    return [row["train/loss"] for row in read_csv(folder / "metrics.csv") if "train/loss" in row]


def cached(out, *more):
    return ("teacher=cached", f"teacher.path={out}", *more)


def test_cached_scores_of_references_train_as_the_live_teacher(small, tmp_path, caplog):
    out = tmp_path / "scores"
    with caplog.at_level(logging.INFO):
        score(small("method=kd"), out, k=12, shard_size=5)
    assert losses(run(small("method=kd", *TOPK, *cached(out)))) == pytest.approx(
        losses(run(small("method=kd", *TOPK, "teacher=topk", "teacher.k=12"))), abs=1e-4
    )
    estimate, written = (float(re.search(rf"{word} ([\d.]+) KiB", caplog.text)[1]) for word in ("about", "written:"))
    assert len(list(out.glob("*.safetensors"))) == 4 and estimate == pytest.approx(written, rel=0.1)


@pytest.mark.slow
def test_hidden_states_keep_the_exact_vocabulary(small, tmp_path):
    out = tmp_path / "scores"
    score(small("method=kd"), out, kind="hidden")
    live, kept = (run(small("method=kd", *more)) for more in ((), cached(out)))
    assert losses(kept) == pytest.approx(losses(live), rel=2e-2)
    assert read_csv(kept / "metrics.csv")[1]["train/reverse_kl"] > 0


@pytest.mark.slow
def test_recorded_completions_of_the_student(small, tmp_path):
    """Two completions each, in two passes: training reads them without an engine, and learns the same from live scores."""
    out = tmp_path / "scores"
    score(small("method=opd", "rollout.num_generations=2"), out, passes=2)
    index = ScoreFiles(out).index
    assert index.num_generations == 2 and [shard["samples"] for shard in index.shards] == [32, 32]
    recorded = ("method=opd", *TOPK, "rollout=recorded", f"rollout.path={out}")
    live = run(small(*recorded, "teacher=topk", "teacher.k=20"))
    assert losses(run(small(*recorded, *cached(out)))) == pytest.approx(losses(live), abs=1e-4)


@pytest.mark.slow
def test_the_context_is_in_the_scores(small, tmp_path):
    """A self-teacher with demonstrations, kept: its scores are those of its own prompt."""
    out = tmp_path / "scores"
    score(small("method=sdft", "teacher=frozen"), out)
    recorded = ("method=sdft", *TOPK, "rollout=recorded", f"rollout.path={out}")
    live = run(small(*recorded, "teacher=frozen"))
    assert losses(run(small(*recorded, "context=none", *cached(out)))) == pytest.approx(losses(live), abs=1e-4)


@pytest.mark.slow
def test_interrupted_scoring_goes_on(small, tmp_path, monkeypatch):
    whole, broken, save = tmp_path / "whole", tmp_path / "broken", write.save_shard
    score(small("method=kd"), whole, shard_size=6)

    def fail(path, *arguments):
        if path.name.startswith("00001"):
            raise KeyboardInterrupt
        save(path, *arguments)

    monkeypatch.setattr(write, "save_shard", fail)
    with pytest.raises(KeyboardInterrupt):
        score(small("method=kd"), broken, shard_size=6)
    with pytest.raises(ValueError, match="is not complete"):
        ScoreFiles(broken)
    monkeypatch.setattr(write, "save_shard", save)
    with pytest.raises(ValueError, match="holds scores of other settings"):
        score(small("method=kd"), broken, shard_size=6, k=5)
    score(small("method=kd"), broken, shard_size=6)
    for path in whole.iterdir():
        assert path.name.endswith(".lock") or path.read_bytes() == (broken / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "overrides", "sentence"),
    [
        ({"tokenizer": "another"}, (), "was scored for a student with another tokenizer"),
        ({"complete": False}, (), "is not complete"),
        ({"format": 0}, (), "is of format 0"),
        ({}, ("seed=5", "task.n_train=32"), "has no scores of a completion of example"),
        ({}, ("loss.vocab_support.k=25",), "k=25 exceeds the 20 tokens that the teacher gives"),
        ({}, ("loss.vocab_support.of=student",), "reads of the teacher its whole vocabulary"),
        ({}, ("context=demonstration",), "scores without reading its context"),
    ],
)
def test_scores_that_do_not_fit_are_refused(small, scored, change, overrides, sentence):
    index = scored / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        run(small("method=kd", *TOPK, *cached(scored), *overrides))


@pytest.fixture
def scored(small, tmp_path):
    score(small("method=kd"), tmp_path / "scores")
    return tmp_path / "scores"


@pytest.mark.slow
def test_another_output_layer_is_refused(small, tmp_path, other):
    teacher = save_tiny(tmp_path / "teacher", seed=8)
    score(small("method=kd", f"model.teacher={teacher}"), tmp_path / "scores", kind="hidden")
    save_tiny(tmp_path / "teacher", seed=9)
    with pytest.raises(ValueError, match="has hidden states of another model"):
        run(small("method=kd", *cached(tmp_path / "scores")))


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        (("method=sdft", "teacher=ema"), {}, "the teacher follows the student"),
        (("method=sft",), {}, "reads no teacher's scores"),
        (("method=kd", *TOPK, "teacher=topk", "teacher.k=10"), {}, "k=20 exceeds the 10 tokens"),
        (("method=kd", *TOPK, "teacher=topk", "teacher.k=10"), {"kind": "hidden"}, "gives no hidden states"),
        (("method=kd",), {"kind": "all"}, "kind=all is unknown"),
        (("method=kd",), {"passes": 0}, "passes=0 must be at least 1"),
        (("method=kd",), {"k": 99}, r"k=99 exceeds the \d+ tokens that the teacher gives"),
        (("method=kd", *TOPK, "teacher=topk", "teacher.k=99"), {"k": 5}, r"teacher.k=99 exceeds the \d+ tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused(small, tmp_path, overrides, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        score(small(*overrides), tmp_path / "scores", **options)


@pytest.mark.parametrize("out", ["/proc/zz", "file/out"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(small, tmp_path, monkeypatch, out):
    (tmp_path / "file").touch()
    monkeypatch.setattr(make, "assemble", None)
    with pytest.raises(ValueError, match=r"out=.* cannot be written \(.*choose another folder"):
        score(small("method=kd"), tmp_path / out)


def test_scoring_that_goes_on_refuses_what_is_another(small, tmp_path):
    """Rows, weights, micro-batches: each is named."""
    rows, teacher, out = tmp_path / "rows.jsonl", tmp_path / "teacher", tmp_path / "scores"
    given = ["method=kd", "task=table", f"task.path={rows}", "task.max_new_tokens=8", f"model.teacher={teacher}"]
    given += ["~task.n_train", "~task.n_eval", "evaluation=none"]

    def begin(*more, words="w w", seed=1):
        rows.write_text("".join(json.dumps({"prompt": f"{words} {i}", "completion": "w"}) + "\n" for i in range(12)))
        save_tiny(teacher, seed)
        score(small(*given, *more), out, k=3)

    begin()
    for sentence, more, options in [
        ("the training examples differ", (), {"words": "w"}),
        ("teacher: the teacher is not what it was", (), {"seed": 2}),
        ("max_tokens_per_microbatch=64, and ", ("max_tokens_per_microbatch=64",), {}),
    ]:
        with pytest.raises(ValueError, match=f"holds scores of other settings: .*({sentence}).*choose another out"):
            begin(*more, **options)


@pytest.mark.slow
def test_the_command(command, tmp_path):
    code, text, _ = command("out=" + str(tmp_path / "s"), "k=3", "method=kd", "task.n_train=8", main=main)
    assert code == 0 and ScoreFiles(tmp_path / "s").index.k == 3
    code, text, _ = command("method=kd", main=main)
    assert code == 1 and "out= is missing" in text


def test_keys_tell_prompts_from_completions():
    ids = torch.tensor([1, 2, 3])
    assert key_of(ids, 1) == key_of(ids.int(), 1) != key_of(ids, 2)
