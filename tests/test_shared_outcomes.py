"""The shared reading of tokens that only one side has: what is compared, its optimum, and equal tokenizers by the long way."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_aligned_teacher import gradients, objective
from tokenizers import Tokenizer, decoders, models

from opd_lightning.data.alignment import shared_tokens
from opd_lightning.data.beginnings import token_classes
from opd_lightning.data.token_bytes import TokenBytes
from opd_lightning.losses.aligned_targets import CoarseLogits, CoarseTopK
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.outcomes import Outcomes
from opd_lightning.losses.seeing_weights import important, ranked
from opd_lightning.preflight.components import check_columns
from opd_lightning.teachers import TopKTeacher, external
from opd_lightning.teachers.alignment import Spans, aligned
from opd_lightning.teachers.alignment.readings import alignment_of
from opd_lightning.types import SamplingParams, Tokens
from tests.zoo import CHAT, SPECIAL, samples_of, save_model, student_of, tokenizers, wrapped


def bpe(letters: str, merges: list[tuple[str, str]]) -> TokenBytes:
    """A tokenizer of letters, and of longer tokens by its merges."""
    vocabulary = [*SPECIAL, *letters, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return TokenBytes(wrapped(core))


def pair(mine: TokenBytes, theirs: TokenBytes) -> tuple[Outcomes, dict[str, int], dict[str, int]]:
    """The outcomes of two tokenizers, and the ids of both by token."""
    pairs = shared_tokens(mine, theirs, (2, 2))
    classes = tuple(torch.from_numpy(part) for part in token_classes(mine, theirs, pairs))
    every = tuple(torch.ones(len(part), dtype=torch.bool) for part in classes)
    outcomes = Outcomes.of(classes, every, tuple(torch.tensor(ids) for ids in pairs))
    return outcomes, mine.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()


def distribution(ids: dict[str, int], shares: dict[str, float]) -> torch.Tensor:
    """Log-probabilities [1, V] in float64 of a few tokens."""
    p = torch.zeros(1, len(ids), dtype=torch.float64)
    for token, share in shares.items():
        p[0, ids[token]] = share
    return p.log()


STUDENT, TEACHER = bpe("abcxy", [("x", "y"), ("xy", "y")]), bpe("abcxyz", [("a", "b"), ("ab", "c"), ("x", "x"), ("z", "z")])
"""Only the student has xy and xyy, only the teacher ab, abc, xx, z and zz."""


def test_a_token_counts_under_the_one_that_the_other_side_writes_first():
    outcomes, mine, theirs = pair(STUDENT, TEACHER)
    of_student, of_teacher = outcomes.student.outcome, outcomes.teacher.outcome
    for shared, own, other in (("a", [], ["ab", "abc"]), ("x", ["xy", "xyy"], ["xx"]), ("b", [], []), ("y", [], [])):
        outcome = of_student[mine[shared]]
        for ids, classes, tokens in ((mine, of_student, own), (theirs, of_teacher, other)):
            assert {ids[token] for token in [shared, *tokens]} == set((classes == outcome).nonzero()[:, 0].tolist())
    assert all(of_teacher[theirs[token]] == len(outcomes.teacher) for token in ("z", "zz"))  # the student cannot write these
    assert outcomes.student.whole and not outcomes.teacher.whole


def test_the_same_texts_have_no_divergence_and_no_gradient():
    """The teacher writes `ab` where the student writes `a`, then `b`; the student's `xy` is the teacher's `x`, then `y`."""
    outcomes, mine, theirs = pair(STUDENT, TEACHER)
    log_t = distribution(theirs, {"ab": 0.3, "a": 0.1, "abc": 0.1, "x": 0.4, "xx": 0.05, "c": 0.05})
    logits = distribution(mine, {"a": 0.5, "xy": 0.35, "x": 0.1, "c": 0.05}).clamp_min(-40).requires_grad_()
    zeros = torch.zeros(1, dtype=torch.long)
    for divergence in (forward_kl, jsd):
        target = CoarseLogits(log_t, outcomes).log_probs(1.0)
        coarse, target, _, _ = target.compared(logits.log_softmax(-1), Tokens(zeros, zeros, zeros))
        loss = divergence(coarse, target.log_p).sum()
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.abs() < 1e-12 and grad.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd])
def test_the_optimum_is_the_teachers_text_and_own_tokens_do_not_grow(divergence):
    """`zz`, which the student cannot write, is most of what the teacher says; the student's own `xy` gains nothing from it."""
    outcomes, mine, theirs = pair(STUDENT, TEACHER)
    shares = {"ab": 0.2, "x": 0.08, "xx": 0.02, "c": 0.1, "zz": 0.5, "b": 0.05, "y": 0.03, "a": 0.02}
    log_t = distribution(theirs, shares).clamp_min(-40)
    start = distribution(mine, {"a": 0.1, "b": 0.2, "c": 0.1, "x": 0.3, "y": 0.1, "xy": 0.2}).clamp_min(-40)
    logits, zeros = start.clone().requires_grad_(), torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD([logits], 2.0)
    for _ in range(400):
        target = CoarseLogits(log_t, outcomes).log_probs(1.0)
        coarse, target, _, _ = target.compared(logits.log_softmax(-1), Tokens(zeros, zeros, zeros))
        loss = divergence(coarse, target.log_p).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = logits.detach().softmax(-1)[0]
    assert loss.item() < 1e-3
    expected = {"a": 0.44, "c": 0.2, "b": 0.1, "y": 0.06}
    assert all(found[mine[token]].item() == pytest.approx(share, abs=0.02) for token, share in expected.items())
    own = found[mine["xy"]] + found[mine["xyy"]]
    assert own < 0.2 and (own + found[mine["x"]]).item() == pytest.approx(0.2, abs=0.02)


def test_values_and_gradients_of_random_classes_against_sums_in_float64():
    """Sums of probabilities by a matrix of zeros and ones, and a finite gradient where a class has probability 0."""
    torch.manual_seed(0)
    student, teacher = torch.randint(9, (40,)), torch.randint(3, 12, (60,))
    every = [torch.ones(len(part), dtype=torch.bool) for part in (student, teacher)]
    outcomes = Outcomes.of((student, teacher), (every[0], every[1]), (student[:0], teacher[:0]))
    s, t = torch.randn(7, 40, dtype=torch.float64, requires_grad=True), torch.randn(7, 60, dtype=torch.float64)
    zeros = torch.zeros(7, dtype=torch.long)
    target = CoarseLogits(t, outcomes).log_probs(1.0)
    coarse, target, _, _ = target.compared(s.log_softmax(-1), Tokens(zeros, zeros, zeros))
    loss = reverse_kl(coarse, target.log_p).sum()
    common = sorted(set(student.tolist()) & set(teacher.tolist()))
    p, q = (
        x.softmax(-1) @ torch.stack([classes == k for k in common], 1).double() for x, classes in ((s, student), (t, teacher))
    )
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    reference = (p * (p / q).log()).sum()
    torch.testing.assert_close(loss, reference)
    grads = [torch.autograd.grad(value, s, retain_graph=True)[0] for value in (loss, reference)]
    torch.testing.assert_close(*grads)
    impossible = s.detach().masked_fill(student == common[0], -torch.inf).requires_grad_()
    coarse = outcomes.student.log_probs(impossible.log_softmax(-1))
    (grad,) = torch.autograd.grad(coarse.masked_fill(coarse == -torch.inf, 0.0).sum(), impossible)
    assert (coarse == -torch.inf).any() and grad.isfinite().all()


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd])
def test_equal_tokenizers_are_the_identity_without_a_shortcut(paths, divergence):
    """Neither the spans' nor the outcomes' shortcut: tokens by their bytes, sums over classes of one."""
    student, renderer = student_of(paths["byte_bpe"])
    samples = samples_of(renderer, ["the quick brown fox 🙂 漢字", "def f(x):\n\treturn x"])
    plain, general = external(paths["other"]), aligned(external(paths["other"], alignment="shared"), renderer)
    plain.setup(student, renderer)
    general.setup(student, renderer)
    assert general.same_tokens
    general.same_tokens = False
    scores = general.score(samples)
    outcomes = scores.target.shared.outcomes(scores.target.teacher)
    for side in (outcomes.student, outcomes.teacher):
        assert side.plain
        side.__dict__["plain"] = False
    assert scores.valid.all()
    one, two = (gradients(student, samples, x, objective(divergence)) for x in (plain.score(samples), scores))
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mine", "theirs"), [("byte_bpe", "unigram"), ("unigram", "byte_bpe"), ("small_bpe", "characters")])
def test_two_models_of_other_tokenizers_against_a_plain_reference(tmp_path, mine, theirs):
    """Logits of both models position by position, by hand: tokens grouped in Python, positions by byte offsets."""
    places = [save_model(tmp_path / name, tokenizers()[name], seed) for seed, name in enumerate((mine, theirs))]
    student, renderer = student_of(places[0])
    teacher = aligned(external(places[1]), renderer)
    teacher.setup(student, renderer)
    samples = samples_of(renderer, ["the red fox 🙂", "sort 1 2 Привет"], ended=False)
    scores = teacher.score(samples)
    value, _ = gradients(student, samples, scores, objective(reverse_kl))
    own, other = (TokenBytes(tokenizers()[name]) for name in (mine, theirs))
    groups = by_hand(own, other, teacher.ids)
    covered = {i for both in groups for i in both[0]}
    total, counted = 0.0, 0
    for sample in samples:
        ids = sample.token_ids[sample.prompt_length :].tolist()
        text = renderer.decode(ids)
        read = teacher.own.reply(text)[:-1]
        prompt = teacher.own.render(CHAT).token_ids
        with torch.no_grad():
            s = student.lm(sample.token_ids[None]).logits[0].double().softmax(-1)[sample.prompt_length - 1 : -1]
            logits = teacher.inner.weights.model.lm(torch.tensor([[*prompt, *read]])).logits[0, len(prompt) - 1 : -1]
            t = logits.double().softmax(-1)
        mine_at, theirs_at = (
            np.cumsum([0, *(len(tokens.table[i]) for i in row)]) for tokens, row in ((own, ids), (other, read))
        )
        for i, start in enumerate(mine_at[:-1].tolist()):
            j = np.flatnonzero(theirs_at[:-1] == start)
            if not len(j) or ids[i] not in covered:
                continue
            p, q = (torch.stack([x[both[at]].sum() for both in groups]) for at, x in enumerate((s[i], t[j[0]])))
            p, q = p / p.sum(), q / q.sum()
            total, counted = total + (p * (p / q).log()).sum().item(), counted + 1
    assert counted > 10
    assert value == pytest.approx(total, rel=1e-4)


def by_hand(own: TokenBytes, other: TokenBytes, pairs) -> list[tuple[list[int], list[int]]]:
    """The ids of both sides that are one outcome, token by token."""
    shared = {("own", s): s for s in pairs[0]} | {("other", t): s for s, t in zip(*pairs, strict=True)}

    def root(side: str, i: int):
        if (side, i) in shared:
            return shared[side, i]
        mine, theirs, there = (own, other, "other") if side == "own" else (other, own, "own")
        data = mine.table[i]
        if not data or i in mine.special:
            return side, i
        try:
            first = next((k for k in theirs.encode(data.decode()).ids if theirs.table[k]), None)
        except UnicodeDecodeError:
            known = [(len(x), -k) for k, x in enumerate(theirs.table) if x and data.startswith(x) and k not in theirs.special]
            first = -max(known)[1] if known else None
        return (side, i) if first is None or not data.startswith(theirs.table[first]) else root(there, first)

    found: dict = {}
    for at, (side, tokens) in enumerate((("own", own), ("other", other))):
        for i in range(len(tokens.table)):
            found.setdefault(root(side, i), ([], []))[at].append(i)
    return [both for both in found.values() if both[0] and both[1]]


def test_listed_tokens_of_one_outcome_are_added_and_others_left_out():
    outcomes, mine, theirs = pair(STUDENT, TEACHER)
    ids = outcomes.teacher.outcome[torch.tensor([[theirs[token] for token in ("ab", "zz", "a", "c")]])]
    target = CoarseTopK(ids, torch.tensor([[0.4, 0.2, 0.1, 0.1]]).log(), outcomes).log_probs(1.0)
    log_s = distribution(mine, {"a": 0.5, "xy": 0.2, "c": 0.3}).float()
    zeros = torch.zeros(1, dtype=torch.long)
    coarse, target, _, _ = target.compared(log_s, Tokens(zeros + mine["c"], zeros, zeros))
    torch.testing.assert_close(target.log_p.exp(), torch.tensor([[0.625, 0.0, 0.0, 0.125, 0.25]]))
    torch.testing.assert_close(coarse.exp(), torch.tensor([[0.5, 0.0, 0.0, 0.3, 0.2]]))
    assert replace(target, valid=None).of(torch.tensor([3])).exp().item() == pytest.approx(0.125)


def test_outcomes_are_kept_with_scores_by_the_students_ids():
    outcomes, mine, _ = pair(STUDENT, TEACHER)
    every = torch.ones(len(mine), dtype=torch.bool)
    kept = Outcomes.kept(outcomes.of_student(), every)
    log_s = torch.randn(3, len(mine)).log_softmax(-1)
    torch.testing.assert_close(kept.student.log_probs(log_s), outcomes.student.log_probs(log_s))
    torch.testing.assert_close(kept.log_shared(log_s, kept.student), outcomes.log_shared(log_s, outcomes.student))


@pytest.mark.parametrize("changed", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_spans_are_refused_where_sampling_changes_the_distribution(changed):
    Spans().check_sampling(SamplingParams(8))
    with pytest.raises(ValueError, match=r"teacher.alignment=spans spreads .*temperature=1, top_p=1 and top_k=0"):
        Spans().check_sampling(SamplingParams(8, **changed))


@pytest.mark.parametrize("value", ["words", 1, True, object()])
def test_what_is_no_reading_is_refused(value):
    with pytest.raises(ValueError, match=r"teacher.alignment=.* is no reading; choose spans, shared, uld, null, or an object"):
        alignment_of(value)


def test_a_weight_that_reads_exact_kls_is_refused_where_a_teacher_has_none(paths):
    _, renderer = student_of(paths["byte_bpe"])
    one, own = aligned(external(paths["unigram"]), renderer), external(paths["other"])
    by_kl = partial(ranked, by="forward_kl")
    for weight, teacher in ((important, one), (by_kl, one), (important, TopKTeacher(own, 2))):
        with pytest.raises(ValueError, match=r"loss.weight reads forward_kl, .*another weight"):
            check_columns(weight, teacher)
    check_columns(important, own)
    check_columns(ranked, one)
