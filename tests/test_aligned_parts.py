"""Teachers with another tokenizer as parts of routed, mixed, top-k and shuffled teachers; and kept in files."""

from dataclasses import replace

import pytest
import torch
from test_aligned_teacher import gradients, objective

from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl, total_variation
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.score.make import check_teacher
from opd_lightning.teachers import MixedTeacher, RoutedTeacher, ShuffledTeacher, TopKTeacher, external
from opd_lightning.teachers.alignment import aligned
from opd_lightning.teachers.base import Composite
from opd_lightning.training.run import run
from opd_lightning.types import Tokens
from tests.zoo import samples_of, student_of

TEXTS = ["the quick fox", "def f(x)", "red green 1 2", "sort 漢"]
SKILLS = ["new", "prior", "new", "prior"]


def skilled(renderer):
    """Samples of two skills, in turns."""
    rows = zip(samples_of(renderer, TEXTS), SKILLS, strict=True)
    return [replace(s, example=replace(s.example, skill=skill)) for s, skill in rows]


def ready(teacher, student, renderer):
    """A teacher for a student, set up."""
    teacher = aligned(teacher, renderer)
    teacher.setup(student, renderer)
    return teacher


@pytest.mark.parametrize(
    ("names", "alignment", "divergence", "support"),
    [
        (("unigram", "other"), "shared", reverse_kl, FullVocabulary()),
        (("other", "characters"), "shared", forward_kl, TopK(8)),
        (("unigram", "characters"), "shared", jsd, TopK(6, of="student")),
        (("unigram", "characters"), "uld", total_variation, FullVocabulary()),
        (("unigram", "characters"), "spans", reverse_kl, SampledToken()),
    ],
)
def test_a_routed_teacher_gives_each_sample_its_teachers_own_loss(paths, names, alignment, divergence, support):
    """Loss and gradient are the sums of those of the teachers alone, on their own samples."""
    student, renderer = student_of(paths["byte_bpe"])

    def parts():
        return [external(paths[name], alignment=None if name == "other" else alignment) for name in names]

    routed = ready(RoutedTeacher(dict(zip(("new", "prior"), parts(), strict=True))), student, renderer)
    some = skilled(renderer)
    scores = routed.score(some)
    loss = objective(divergence, support)
    total, grads = gradients(student, some, scores, loss)
    alone = []
    for skill, part in zip(("new", "prior"), parts(), strict=True):
        own = [s for s in some if s.example.skill == skill]
        alone.append(gradients(student, own, ready(part, student, renderer).score(own), loss))
    assert total == pytest.approx(sum(value for value, _ in alone), rel=1e-5)
    for grad, *each in zip(grads, *(found for _, found in alone), strict=True):
        torch.testing.assert_close(grad, sum(each), rtol=1e-4, atol=1e-5)
    assert {"share/new", "aligned"} <= set(scores.metrics)


def test_a_routed_teacher_of_top_k_parts_is_compared_on_its_own_tokens(paths):
    student, renderer = student_of(paths["byte_bpe"])
    some = skilled(renderer)
    teacher = {"new": TopKTeacher(external(paths["unigram"]), 5), "prior": TopKTeacher(external(paths["other"]), 5)}
    scores = ready(RoutedTeacher(teacher), student, renderer).score(some)
    value, _ = gradients(student, some, scores, objective(forward_kl, TopK(5)))
    alone = 0.0
    for skill, part in teacher.items():
        own = [s for s in some if s.example.skill == skill]
        alone += gradients(student, own, ready(part, student, renderer).score(own), objective(forward_kl, TopK(5)))[0]
    assert value == pytest.approx(alone, rel=1e-5) and value > 0


def outcomes(teacher, some, student):
    """A teacher's log-probabilities of outcomes, where it has a target."""
    scores = teacher.score(some)
    return scores, scores.chunk(slice(None)).log_probs(1.0)


def test_a_mixture_is_over_the_tokens_that_all_share(paths):
    student, renderer = student_of(paths["byte_bpe"])
    some = skilled(renderer)
    weights = {"one": 3.0, "two": 1.0, "three": 4.0}
    parts = {"one": "unigram", "two": "characters", "three": "other"}
    teachers = {name: ready(external(paths[path]), student, renderer) for name, path in parts.items()}
    teacher = ready(MixedTeacher({n: external(paths[p]) for n, p in parts.items()}, weights), student, renderer)
    scores, target = outcomes(teacher, some, student)
    assert teacher.provides == {"full", "topk"} and scores.valid is not None and scores.valid.any()
    common = set(teachers["one"].ids[0]) & set(teachers["two"].ids[0])
    classes = target.outcomes.student
    assert set(classes.first[target.outcomes.shared].tolist()) <= common and not classes.whole
    torch.testing.assert_close(target.log_p.exp().sum(-1), torch.ones(len(target.log_p)))
    expected = torch.zeros(len(target.log_p), len(classes))
    for name, part in teachers.items():
        _, own = outcomes(part, some, student)
        ids = own.outcomes.student.first if hasattr(own, "outcomes") else torch.arange(own.log_p.shape[-1])
        into = torch.nn.functional.one_hot(classes.outcome[ids], len(classes) + 1)[:, :-1].float()
        mass = own.log_p.exp() @ into
        expected += mass / mass.sum(-1, keepdim=True) * weights[name] / 8
        if hasattr(own, "outcomes"):  # tokens that one teacher counts together are together
            of = own.outcomes.student.outcome
            assert all(len(classes.outcome[of == k].unique()) == 1 for k in range(len(own.outcomes.student)))
    torch.testing.assert_close(target.log_p.exp()[scores.valid], expected[scores.valid], rtol=1e-4, atol=1e-6)
    assert gradients(student, some, scores, objective(reverse_kl))[0] > 0
    with pytest.raises(ValueError, match=r"loss.temperature=2.0 cannot be applied to a mixture"):
        scores.chunk(slice(None)).log_probs(2.0)


def test_a_mixture_of_equal_tokenizers_is_the_usual_one(paths):
    student, renderer = student_of(paths["byte_bpe"])
    some = skilled(renderer)
    found = []
    for alignment in (None, "shared"):
        parts = {"a": external(paths["other"], alignment=alignment), "b": external(paths["byte_bpe"])}
        scores = ready(MixedTeacher(parts), student, renderer).score(some)
        found.append(gradients(student, some, scores, objective(forward_kl)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda t: RoutedTeacher({"new": t, "prior": t}), lambda t: MixedTeacher({"a": t})])
def test_a_top_k_view_of_several_keeps_the_most_probable_shared_tokens(paths, make):
    student, renderer = student_of(paths["byte_bpe"])
    some = skilled(renderer)
    teacher = ready(TopKTeacher(make(external(paths["unigram"])), 4), student, renderer)
    assert teacher.provides == {"topk"} and teacher.top_k == 4
    whole = ready(external(paths["unigram"]), student, renderer)
    scores, full = outcomes(whole, some, student)
    top = full.log_p.topk(4, -1)
    kept = teacher.score(some).chunk(slice(None))
    rows = kept.part.argsort(stable=True) if hasattr(kept, "parts") else torch.arange(len(scores.valid))
    parts = getattr(kept, "parts", [kept])
    valid = scores.valid[rows]
    torch.testing.assert_close(torch.cat([part.logprobs for part in parts])[valid], top.values[rows][valid])
    names = torch.cat([part.top(4)[0] for part in parts])
    assert torch.equal(names[valid], full.outcomes.student.first[top.indices[rows]][valid])
    values = [
        gradients(student, some, t.score(some), objective(forward_kl, s))[0]
        for t, s in ((teacher, TopK(4)), (whole, FullVocabulary()))
    ]
    assert 0 < values[0] < values[1]
    with pytest.raises(ValueError, match=r"k=9999 exceeds the \d+ outcomes on which"):
        full.truncated(9999, torch.zeros(1, dtype=torch.long))


def test_a_top_k_view_has_the_signal_of_spans(paths):
    student, renderer = student_of(paths["byte_bpe"])
    some = skilled(renderer)
    whole = ready(external(paths["unigram"], alignment="spans"), student, renderer).score(some)
    cut = ready(TopKTeacher(external(paths["unigram"], alignment="spans"), 2), student, renderer).score(some)
    assert torch.equal(whole.valid, cut.valid) and whole.valid.any()
    torch.testing.assert_close(cut.target.sampled[cut.valid], whole.target.sampled[cut.valid], rtol=1e-4, atol=1e-4)


def test_a_shuffled_teacher_moves_targets_of_another_tokenizer(paths):
    student, renderer = student_of(paths["byte_bpe"])
    some = samples_of(renderer, ["the quick fox"])
    teacher = ready(ShuffledTeacher(external(paths["unigram"])), student, renderer)
    plain, moved = (t.score(some).chunk(slice(None)) for t in (teacher.inner, teacher))
    order = teacher.permutation(some[0])
    assert torch.equal(moved.own_logits, plain.own_logits[order]) and torch.equal(moved.valid, plain.valid[order])


class Mine(Composite):
    """A composite without `remade`."""


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda one, two, _: MixedTeacher({"a": one("spans"), "b": two()}), r"teacher=mixed averages .*alignment=shared"),
        (lambda one, two, _: MixedTeacher({"a": one(), "b": two()}, space="log"), r"teacher=mixed averages .*probability"),
        (lambda one, two, _: MixedTeacher({"a": one("uld")}), r"teacher=mixed averages"),
        (lambda one, two, _: MixedTeacher({"a": RoutedTeacher({"new": one(), "b": two()})}), r"has to be a single teacher"),
        (lambda one, two, _: TopKTeacher(one("uld"), 2), r"sorted probabilities, which are of no tokens"),
        (lambda one, two, _: TopKTeacher(RoutedTeacher({"a": one("spans")}), 2), r"no whole vocabulary to take the top k"),
        (lambda one, two, _: ShuffledTeacher(one("spans")), r"log-probability alone, which cannot move"),
        (lambda one, two, _: RoutedTeacher({"new": one("uld"), "b": two()}), r"by rank and other teachers in it by token"),
        (lambda one, two, _: RoutedTeacher({"new": one("spans"), "b": one()}), r"no kind of target in common"),
        (lambda one, two, _: Mine({"a": one()}), r"teacher=Mine takes no teachers with another tokenizer"),
    ],
)
def test_what_is_not_defined_is_refused(paths, make, sentence):
    _, renderer = student_of(paths["byte_bpe"])

    def one(alignment=None):
        return external(paths["unigram"], alignment=alignment)

    with pytest.raises(ValueError, match=sentence):
        aligned(make(one, lambda: external(paths["other"]), renderer), renderer)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda one: one("spans"), r"cannot be kept: spans are for tokens .*teacher.alignment=shared"),
        (lambda one: one("uld"), r"cannot be kept: sorted probabilities"),
        (lambda one: RoutedTeacher({"a": one("uld")}), r"cannot be kept: sorted probabilities"),
        (lambda one: TopKTeacher(one(), 20), r"cannot be kept: .* top k are chosen from its whole vocabulary"),
    ],
)
def test_scores_that_cannot_be_kept_are_refused(paths, make, sentence):
    _, renderer = student_of(paths["byte_bpe"])
    teacher = aligned(make(lambda alignment=None: external(paths["unigram"], alignment=alignment)), renderer)
    with pytest.raises(ValueError, match=sentence):
        check_teacher(teacher, "topk", 5)


ROUTED = "teacher=routed teacher@teacher.teachers.prior=external teacher.teachers.prior.path={c} teacher.teachers.new.path={b}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        f"{ROUTED}",
        f"{ROUTED} teacher.teachers.new.alignment=spans teacher.teachers.prior.alignment=spans loss/vocab_support=sampled",
        "teacher=mixed teacher@teacher.teachers.start=external teacher.teachers.start.path={c} "
        "teacher.teachers.strong.path={b}",
        "teacher=topk teacher.teacher.path={b} loss/vocab_support=topk loss.vocab_support.k=8",
        "teacher=shuffled teacher.teacher.path={b}",
    ],
)
def test_a_run(small, paths, options):
    words = options.format(b=paths["byte_bpe"], c=paths["characters"]).split()
    rows = read_csv(run(small(*words, "evaluation=text")) / "metrics.csv")
    row = next(row for row in reversed(rows) if row.get("train/loss") is not None)
    assert row["train/grad_norm"] > 0


def test_a_kept_token_is_read_where_a_teacher_has_none(paths):
    """Tokens that a routed part lacks are impossible outcomes on both sides, and have no gradient."""
    student, renderer = student_of(paths["byte_bpe"])
    some = skilled(renderer)
    scores = ready(
        RoutedTeacher({"new": external(paths["unigram"]), "prior": external(paths["other"])}), student, renderer
    ).score(some)
    n, size = len(scores.part), len(renderer.tokenizer)
    zeros = torch.zeros(n, dtype=torch.long)
    log_s = torch.randn(n, size).log_softmax(-1)
    coarse, target, _, mass = scores.chunk(slice(None)).log_probs(1.0).compared(log_s, Tokens(zeros, zeros, zeros))
    for log_p in (coarse, target.log_p):
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(n))
    plain = scores.part == 1
    assert torch.equal(coarse[plain][:, :size], log_s[plain]) and (mass[plain] == 0).all() and (mass[~plain] < 0).all()
