"""Teachers with another tokenizer in runs: local, served and cached, with contexts; and what is refused."""

import csv
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import Served

from experiments.cross_tokenizer.run import RUNS
from experiments.cross_tokenizer.run import main as experiment
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.score.make import score
from opd_lightning.teachers import RemoteTeacher, external
from opd_lightning.teachers.alignment import aligned
from opd_lightning.teachers.contexts import PrivilegedContext
from opd_lightning.training.run import run
from opd_lightning.utils.http import Servers
from tests.zoo import CHAT, samples_of, save_model, student_of, tokenizers

TOPK = ("loss/vocab_support=topk", "loss.vocab_support.k=8")


def losses(folder):
    return [row["train/loss"] for row in read_csv(folder / "metrics.csv") if "train/loss" in row]


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ((), "train/reverse_kl_shared"),
        (("teacher.alignment=spans", "loss/vocab_support=sampled"), "train/log_ratio"),
        (("teacher.alignment=uld", "loss/divergence=total_variation"), "train/sorted_l1"),
    ],
)
def test_a_run_with_another_tokenizer(small, paths, options, logged):
    rows = read_csv(run(small(f"teacher.path={paths['byte_bpe']}", "evaluation=none", *options)) / "metrics.csv")
    row = next(row for row in reversed(rows) if "train/loss" in row and row["train/loss"] is not None)
    assert 0 < row["rollout/teacher_aligned"] <= 1 and row["train/grad_norm"] > 0
    assert row[logged] == row[logged]


@pytest.fixture
def served(paths):
    server = Served(paths["unigram"])
    yield server
    server.close()


@pytest.mark.parametrize(("alignment", "k"), [("spans", 0), ("shared", 20)])
def test_a_served_teacher_says_what_the_local_one_says(paths, served, alignment, k):
    student, renderer = student_of(paths["byte_bpe"])
    samples = samples_of(renderer, ["the red fox", "sort 1 2"])
    remote = RemoteTeacher(Servers([served.url]), k=k, tokenizer=paths["unigram"], alignment=alignment)
    local = external(paths["unigram"], alignment=alignment)
    targets = []
    for teacher in (aligned(remote, renderer), aligned(local, renderer)):
        teacher.setup(student, renderer)
        scores = teacher.score(samples)
        targets.append((scores.valid, scores.chunk(slice(None)).log_probs(1.0)))
    (valid, told), (same, full) = targets
    assert torch.equal(valid, same) and valid.any()
    if alignment == "spans":
        torch.testing.assert_close(told.sampled, full.sampled, rtol=1e-4, atol=1e-4)
        return
    single = torch.bincount(full.outcomes.teacher.outcome) == 1  # of others some tokens may not be listed
    for row in valid.nonzero().flatten().tolist():
        known = zip(told.ids[row].tolist(), told.log_p[row, :-1].tolist(), strict=True)
        told_of = {i: p for i, p in known if i < len(full.outcomes.student) and single[i]}
        assert told_of and all(full.log_p[row, i].item() == pytest.approx(p, abs=1e-4) for i, p in told_of.items())


@pytest.mark.slow
def test_cached_scores_of_shared_tokens_train_nearly_as_the_live_teacher(small, paths, tmp_path):
    """The kept tokens are the most probable shared ones; with all of them the loss over these and the rest is the same."""
    out, teacher = tmp_path / "scores", f"teacher.path={paths['byte_bpe']}"
    score(small("method=kd", teacher), out, k=12)
    kept = losses(run(small("method=kd", *TOPK, "teacher=cached", f"teacher.path={out}")))
    live = losses(run(small("method=kd", teacher)))
    assert all(0 < a <= b + 1e-6 for a, b in zip(kept[:1], live[:1], strict=True)) and len(kept) == len(live) == 2


@pytest.mark.parametrize("name", ["unigram", "byte_bpe"])
def test_what_exceeds_the_teachers_window_has_no_target(paths, name):
    student, renderer = student_of(paths["byte_bpe"])
    teacher = aligned(external(paths[name], alignment="shared"), renderer)
    teacher.setup(student, renderer)
    samples = samples_of(renderer, ["red", "the quick brown fox"])
    before = teacher.score(samples).valid
    teacher.window = len(teacher.rendering(CHAT).token_ids) + 3
    after = teacher.score(samples).valid
    assert teacher.pair(samples[1]).sample.trainable == 3
    assert (after <= before).all() and after.sum() < before.sum() and torch.equal(after[:2], before[:2])


@pytest.mark.slow
def test_the_experiment_with_real_weights_runs_on_tiny_ones(paths, tmp_path):
    places = ["--student", paths["byte_bpe"], "--teacher", paths["unigram"], "--out", str(tmp_path)]
    before = set(Path(tempfile.gettempdir()).iterdir())
    runs = ["english-none-teacher", "german-texts-shared", "english-student-spans", "german-student-uld"]
    assert set(runs) < set(RUNS)
    experiment(["--updates", "1", "--results", str(tmp_path / "results.csv"), *places, "--runs", *runs])
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    expected = [(name, step) for name in runs for step in ("0" if name.endswith("teacher") else "01")]
    assert [(f"{row['language']}-{row['rollout']}-{row['reading']}", row["step"]) for row in rows] == expected
    assert not {path.name for path in set(Path(tempfile.gettempdir()).iterdir()) - before if path.name.startswith("tmp")}
    assert all(float(row["nats_per_byte"]) > 0 for row in rows)


def test_a_context_is_rendered_by_the_teachers_own_template(paths):
    student, renderer = student_of(paths["byte_bpe"])
    teacher = aligned(
        external(
            paths["unigram"], context=PrivilegedContext("demonstration", "{prompt} ({demonstration})"), alignment="shared"
        ),
        renderer,
    )
    teacher.setup(student, renderer)
    read = []
    score_inner = teacher.inner.weights.read
    teacher.inner.weights.read = lambda batches: read.extend(batches) or score_inner(batches)
    (sample,) = samples_of(renderer, ["red"])
    teacher.score([replace(sample, example=replace(sample.example, demonstration="blue green"))])
    text = teacher.own.tokenizer.decode(read[0].input_ids[0])
    assert "blue green" in text and text.endswith("<s>assistant: red</s>") and "sort red blue" in text


@pytest.mark.slow
def test_what_does_not_fit_is_refused(small, paths, tmp_path):
    student, renderer = student_of(paths["byte_bpe"])
    with pytest.raises(ValueError, match=r"another tokenizer.*teacher.alignment=shared, spans or uld"):
        external(paths["unigram"]).check_tokenizer(renderer.tokenizer)
    teacher = aligned(external(paths["unigram"]), renderer)
    teacher.setup(student, renderer)
    (sample,) = samples_of(renderer, ["red"])
    gap = sample.loss_mask.clone()
    gap[-2] = False
    with pytest.raises(ValueError, match=r"turns of an environment.*environment=single_turn"):
        teacher.score([replace(sample, loss_mask=gap)])
    with pytest.raises(ValueError, match=r"written by|lets the teacher write.*another tokenizer"):
        run(small(f"teacher.path={paths['byte_bpe']}", "rollout=teacher"))
    with pytest.raises(ValueError, match=r"SampledToken reads of the teacher.*its whole vocabulary and its most probable"):
        run(small(f"teacher.path={paths['byte_bpe']}", "loss/vocab_support=sampled"))
    with pytest.raises(ValueError, match=r"environment=.*answers in the student's chat template"):
        run(small(f"teacher.path={paths['byte_bpe']}", "environment=calculator"))
    with pytest.raises(ValueError, match=r"teacher.alignment=uld fills .* infinite; choose loss/divergence=total_variation"):
        run(small(f"teacher.path={paths['byte_bpe']}", "teacher.alignment=uld"))
    words = [f"teacher.path={paths['byte_bpe']}", "teacher.alignment=spans", "loss/vocab_support=sampled"]
    for option, sentence in (
        ("rollout.sampling.temperature=0.7", r"teacher.alignment=spans spreads .*\(temperature=0.7\)"),
        ("loss.temperature=0.7", r"loss.temperature=0.7 needs the logits of one teacher's whole vocabulary"),
        ("loss/weight=important", r"loss.weight reads forward_kl, which follows from a teacher's whole vocabulary"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(small(*words, option))
    with pytest.raises(ValueError, match=r"teacher.alignment=1 is no reading"):
        run(small(words[0], "teacher.alignment=1"))
    with pytest.raises(ValueError, match=r"k=9999 exceeds the \d+ tokens that the student shares"):
        run(small(words[0], "loss/vocab_support=topk", "loss.vocab_support.k=9999"))
    with pytest.raises(ValueError, match=r"gives its whole vocabulary; choose loss/vocab_support=full, or another teacher"):
        run(small(words[0], "teacher.alignment=uld", "loss/divergence=jsd", "loss/vocab_support=sampled"))
    spans = aligned(external(paths["unigram"], alignment="spans"), renderer)
    spans.setup(student, renderer)
    (sample,) = samples_of(renderer, ["the quick fox"])
    with pytest.raises(ValueError, match="log-probabilities with which they were drawn"):
        spans.score([replace(sample, logprobs=None)])


def test_a_base_model_reads_by_a_given_chat_template(paths, tmp_path):
    tokenizer = tokenizers()["unigram"]
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        path = save_model(tmp_path / "base", tokenizer)
    finally:
        tokenizer.chat_template = kept
    _, renderer = student_of(paths["byte_bpe"])
    with pytest.raises(ValueError, match=r"no chat template.*teacher.chat_template=<file>"):
        aligned(external(path), renderer)
    plain = "{{ bos_token }}{{ messages[-1]['content'] }}"
    teacher = aligned(external(path, chat_template=plain), renderer)
    assert teacher.own.tokenizer.decode(teacher.rendering(CHAT).token_ids) == "<s>sort red blue"
