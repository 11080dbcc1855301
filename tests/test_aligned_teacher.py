"""Teachers with another tokenizer: their readings against references, and runs with them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.data.batching import collate, pack
from opd_lightning.evaluation.divergence import TeacherDivergence
from opd_lightning.losses import Head, head_loss
from opd_lightning.losses.aligned_targets import CoarseLogits
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl, total_variation
from opd_lightning.losses.objective import Objective
from opd_lightning.losses.outcomes import Outcomes
from opd_lightning.losses.targets import FullLogits, HiddenScores, SampledLogProbs, TopKScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.models import Student
from opd_lightning.teachers import TopKTeacher, external
from opd_lightning.teachers.alignment import AlignedTeacher, SharedVocabulary, SortedProbabilities, Spans, aligned
from opd_lightning.teachers.alignment import scores as aligned_scores
from opd_lightning.teachers.alignment.match import Match, SharedIds
from opd_lightning.types import Sample, Tokens
from opd_lightning.utils.vocabulary import ValidIds
from tests.zoo import CHAT, samples_of, student_of

TEXTS = ["the quick brown fox 🙂 漢字", "def f(x):\n\treturn x", "red green"]


def objective(divergence, support=None, **options) -> Objective:
    return Objective(completion_mask, token_mean, divergence, support or FullVocabulary(), **options)


def gradients(student: Student, samples: list[Sample], scores, loss: Objective) -> tuple[float, list[torch.Tensor]]:
    """The loss of equally weighted valid tokens, and the gradients of all weights."""
    tokens = pack(samples, torch.device("cpu"))
    if scores.valid is not None:
        tokens = replace(tokens, weight=tokens.weight * scores.valid)
    student.zero_grad()
    total, _ = student(collate(samples, 2, torch.device("cpu")), tokens, {"teacher": scores}, loss)
    total.backward()
    return float(total.detach()), [p.grad.clone() for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("alignment", "divergence", "support"),
    [
        ("shared", forward_kl, FullVocabulary()),
        ("shared", reverse_kl, FullVocabulary()),
        ("shared", jsd, TopK(8)),
        ("spans", reverse_kl, SampledToken()),
    ],
)
def test_equal_tokenizers_give_the_same_loss_and_gradient(paths, alignment, divergence, support):
    student, renderer = student_of(paths["byte_bpe"])
    samples = samples_of(renderer, TEXTS)
    plain = external(paths["other"])
    plain.setup(student, renderer)
    same = aligned(external(paths["other"], alignment=alignment), renderer)
    assert isinstance(same, AlignedTeacher) and isinstance(aligned(external(paths["other"]), renderer), type(plain))
    same.setup(student, renderer)
    scores = same.score(samples)
    assert scores.valid.all() and (scores.metrics["one_to_one"] == 1).all()
    one, two = (gradients(student, samples, x, objective(divergence, support)) for x in (plain.score(samples), scores))
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(0, 12), st.integers(0, 10**6), st.sampled_from([0.3, 3.0]))
def test_a_coarsening_is_never_above(size, shared, seed, spread):
    """The KL over any classes of the tokens is at most that over all tokens; equal where each has one of its own."""
    torch.manual_seed(seed)
    s, t = (torch.randn(5, size, dtype=torch.float64) * spread for _ in range(2))
    ids = torch.arange(size)
    alone = torch.randperm(size)[: min(shared, size)]
    classes = torch.randint(size, size + 3, (size,)).scatter(0, alone, alone)
    every = torch.ones(size, dtype=torch.bool)
    target = CoarseLogits(t, Outcomes.of((classes, classes), (every, every), (alone, alone))).log_probs(1.0)
    zeros = torch.zeros(5, dtype=torch.long)
    log_s, seen, _, _ = target.compared(s.log_softmax(-1), Tokens(zeros, zeros, zeros))
    for divergence in (forward_kl, reverse_kl, jsd, total_variation):
        coarse = divergence(log_s, seen.log_p).sum(-1)
        full = divergence(s.log_softmax(-1), t.log_softmax(-1)).sum(-1)
        assert (coarse <= full + 1e-12).all() and (coarse >= -1e-12).all()
        if len(alone) == len(ids):
            torch.testing.assert_close(coarse, full)


CLASSES = ([0, 1, 2, 1, 2, 90, 91], [0, 1, 80, 0, 2, 1, 1, 81, 2])
"""Of the student's 7 tokens and the teacher's 9: classes of several tokens of either side, and tokens that are alone."""


def fake(student_span, teacher_span, logprobs, n_student=7, n_teacher=9, ids=None) -> Match:
    """A match of one sample, from the spans of its tokens."""
    student_span, teacher_span = torch.tensor(student_span), torch.tensor(teacher_span)
    spans = int(student_span.max()) + 1
    first = [torch.tensor([int((x == g).nonzero()[0]) for g in range(spans)]) for x in (student_span, teacher_span)]
    pairs = (torch.tensor([0, 1, 2]), torch.tensor([3, 1, 8]))
    shared = SharedIds(*pairs, ValidIds(n_student), tuple(torch.tensor(part) for part in CLASSES))
    written = torch.arange(len(student_span)) % n_student if ids is None else ids
    return Match(
        student_span=student_span,
        teacher_span=teacher_span,
        first_student=first[0],
        first_teacher=first[1],
        exact=torch.ones(spans, dtype=torch.bool),
        faithful=torch.ones(spans, dtype=torch.bool),
        student_ids=written,
        teacher_ids=torch.arange(len(teacher_span)) % n_teacher,
        sample=torch.zeros(len(student_span), dtype=torch.long),
        sampler_logprob=logprobs,
        vocabulary=ValidIds(n_student),
        shared=shared,
    )


def wide(hidden: torch.Tensor, weight: torch.Tensor, seen: list[int] | None = None) -> HiddenScores:
    """A teacher's scores in float64, which note how many rows are asked for."""
    head = Head(weight)

    def project(rows, out=None):
        if seen is not None:
            seen.append(len(rows))
        return head.project(rows)

    return HiddenScores(hidden, project, len(weight))


@pytest.mark.parametrize("reading", [SharedVocabulary(), SortedProbabilities(), Spans()])
def test_gradients_against_a_plain_reference(reading):
    """In float64, over spans of one and of several tokens of either side."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    other, matrix = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    own = torch.log_softmax(hidden @ weight.T, -1)
    ids = torch.tensor([0, 4, 2, 3, 1, 6])
    drawn = own.detach().gather(-1, ids[:, None]).squeeze(-1)
    match = fake([0, 1, 1, 2, 3, 3], [0, 1, 2, 2, 3], drawn, ids=ids)
    rows: list[int] = []
    scores = reading.scores(wide(other, matrix, rows), match)
    log_t = torch.log_softmax(other @ matrix.T, -1)
    if isinstance(reading, Spans):
        sampled = log_t[torch.arange(5), match.teacher_ids]
        cost = [drawn[0] - sampled[0], (drawn[1:3].sum() - sampled[1]) / 2, drawn[3] - sampled[2:4].sum()]
        cost.append((drawn[4:].sum() - sampled[4]) / 2)
        reference = sum(cost[g].detach() * own[i, ids[i]] for i, g in enumerate(match.student_span.tolist()))
        loss = objective(reverse_kl, SampledToken())
    else:
        loss = objective(total_variation if isinstance(reading, SortedProbabilities) else reverse_kl)
        reference = torch.zeros((), dtype=torch.float64)
        for i, j in ((0, 0), (1, 1), (3, 2), (4, 4)):
            s, t = own[i].exp(), log_t[j].exp()
            if isinstance(reading, SharedVocabulary):
                s, t = (
                    torch.stack([x[[i for i, v in enumerate(c) if v == k]].sum() for k in range(3)])
                    for x, c in zip((s, t), CLASSES, strict=True)
                )
                s, t = s / s.sum(), t / t.sum()
                reference = reference + (s * (s / t).log()).sum()
            else:
                s = torch.cat([s.sort(descending=True).values, torch.zeros(2)])
                reference = reference + (s - t.sort(descending=True).values).abs().sum() / 2
    (expected,) = torch.autograd.grad(reference, weight)
    valid = scores.valid
    assert valid.tolist() == ([True] * 6 if isinstance(reading, Spans) else [True, True, False, True, True, False])
    tokens = Tokens(ids, torch.arange(6), valid.double())
    total, _ = head_loss(hidden, Head(weight), tokens, {"teacher": scores}, loss, chunk=2)
    (grad,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-10)
    if not isinstance(reading, Spans):
        assert max(rows) <= 2  # logits of a chunk alone
        assert total.item() == pytest.approx(reference.item(), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_signal_of_spans_is_unbiased_on_single_tokens_and_a_share_on_longer_ones(seed):
    """Two binary tokens of the student's, by enumeration; the teacher has them as two tokens, or as one of four."""
    torch.manual_seed(seed)
    first, second = torch.randn(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    one, two = torch.randn(2, dtype=torch.float64).log_softmax(-1), torch.randn(2, 2, dtype=torch.float64).log_softmax(-1)
    leaves = [x.clone().requires_grad_() for x in (first, second)]
    log_a, log_b = leaves[0].log_softmax(-1), leaves[1].log_softmax(-1)
    joint_s, joint_t = log_a[:, None] + log_b, one[:, None] + two
    for whole in (False, True):
        surrogate = torch.zeros((), dtype=torch.float64)
        for a in range(2):
            for b in range(2):
                drawn = torch.stack([log_a[a], log_b[a, b]]).detach()
                sampled = joint_t[a, b][None] if whole else torch.stack([one[a], two[a, b]])
                match = fake([0, 0] if whole else [0, 1], [0] if whole else [0, 1], drawn, n_student=2)
                inner = TopKScores(SampledLogProbs(sampled), 9)
                cost = drawn - Spans().scores(inner, match).target.sampled
                probability = drawn.sum().exp()
                surrogate = surrogate + probability * (cost[0] * log_a[a] + cost[1] * log_b[a, b])
        got = torch.autograd.grad(surrogate, leaves, retain_graph=True)
        if whole:  # half of the KL of the joint distributions
            exact = (joint_s.exp() * (joint_s - joint_t)).sum() / 2
        else:  # each token's own KL, on the student's own prefixes
            exact = (log_a.exp() * (log_a - one)).sum() + (log_a.detach().exp()[:, None] * log_b.exp() * (log_b - two)).sum()
        for x, y in zip(got, torch.autograd.grad(exact, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(("mine", "theirs"), [("byte_bpe", "unigram"), ("characters", "byte_bpe"), ("unigram", "characters")])
def test_signals_add_up_to_the_log_ratio_of_the_text(paths, mine, theirs, ended, monkeypatch):
    """Sums over all spans are the log-probabilities of both models for the same text, with its end if it has one."""
    monkeypatch.setattr(aligned_scores, "ENTRIES", 1000)
    student, renderer = student_of(paths[mine])
    teacher = aligned(external(paths[theirs], alignment="spans"), renderer)
    teacher.setup(student, renderer)
    samples = samples_of(renderer, ["the red fox", "sort 1 2"], ended)
    scores = teacher.score(samples)
    assert scores.valid.all() and (scores.metrics["aligned"] == 1).all() and (scores.metrics["one_to_one"] < 1).any()
    drawn = torch.cat([sample.logprobs[sample.loss_mask] for sample in samples])
    own = teacher.own
    for sample, part in zip(samples, (drawn - scores.target.sampled).split([s.trainable for s in samples]), strict=True):
        text = renderer.decode(sample.completion_ids)
        reply = own.reply(text) if ended else own.reply(text)[:-1]
        prompt = own.render(CHAT).token_ids
        with torch.no_grad():
            logits = teacher.inner.weights.model.lm(torch.tensor([[*prompt, *reply]])).logits[0]
        log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(reply)[:, None]).sum()
        total = sample.logprobs[sample.loss_mask].sum() - log_p
        torch.testing.assert_close(part.sum(), total, rtol=1e-4, atol=1e-4)


def test_a_top_k_teacher_is_compared_on_its_shared_tokens(paths):
    student, renderer = student_of(paths["byte_bpe"])
    local = external(paths["unigram"], alignment="shared")
    teacher = aligned(TopKTeacher(local, k=6), renderer)
    assert teacher.provides == {"topk"}
    teacher.setup(student, renderer)
    samples = samples_of(renderer, TEXTS)
    scores = teacher.score(samples)
    listed = scores.chunk(slice(None))
    outcomes, zeros = listed.outcomes, torch.zeros(len(listed.ids), dtype=torch.long)
    log_s = torch.randn(len(zeros), len(renderer.tokenizer)).log_softmax(-1)
    coarse, target, _, _ = listed.log_probs(1.0).compared(log_s, Tokens(zeros, zeros, zeros))
    own = outcomes.student.log_probs(log_s)
    for row in scores.valid.nonzero().flatten().tolist():
        for log_p in (coarse, target.log_p):  # both are distributions
            assert log_p[row].exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        named = listed.ids[row] < len(outcomes.student)
        for outcome in set(listed.ids[row][named].tolist()):  # what is listed of an outcome is counted once
            place = target.ids[row].tolist().index(outcome)
            mass = listed.logprobs[row][listed.ids[row] == outcome].exp().sum()
            inside = 1 - listed.logprobs[row][~named].exp().sum()
            torch.testing.assert_close(target.log_p[row, place].exp(), mass / inside)
            torch.testing.assert_close(coarse[row, place], own[row, outcome])
    full = aligned(local, renderer)
    full.setup(student, renderer)
    losses = [gradients(student, samples, x.score(samples), objective(reverse_kl))[0] for x in (teacher, full)]
    assert 0 < losses[0] < losses[1]  # fewer outcomes
    assert 0 < gradients(student, samples, scores, objective(reverse_kl, TopK(4)))[0] < losses[0]


def test_the_distance_to_a_teacher_is_that_of_shared_tokens(paths):
    student, renderer = student_of(paths["byte_bpe"])
    samples = samples_of(renderer, TEXTS)
    teacher = aligned(external(paths["unigram"]), renderer)
    teacher.setup(student, renderer)
    evaluation = TeacherDivergence.__new__(TeacherDivergence)
    evaluation.renderer, evaluation.examples, evaluation.batch_size = renderer, [samples[0].example], 4
    evaluation.rollout = lambda *_: type("Rollout", (), {"samples": samples})()
    numbers = evaluation(student, {"teacher": teacher}, None)
    assert set(numbers) == {"heldout/reverse_kl_shared", "heldout/forward_kl_shared"}
    assert all(number.value > 0 for number in numbers.values())
    teacher.alignment = SortedProbabilities()
    assert evaluation(student, {"teacher": teacher}, None) == {}


def test_full_logits_are_no_aligned_target():
    assert not hasattr(FullLogits(torch.zeros(1, 2)).log_probs(1.0), "compared")
