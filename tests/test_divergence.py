"""Divergences and supports: closed forms, gradients, limits, and the sampled token's unbiasedness by enumeration."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.targets import FullLogProbs
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.types import Tokens

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd_low": partial(jsd, beta=0.1),
    "jsd_0": partial(jsd, beta=0.0),
    "jsd_1": partial(jsd, beta=1.0),
}
each = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())


def pair(n: int = 5, vocab: int = 7, seed: int = 0):
    """Random student and teacher logits in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, n, vocab, dtype=torch.float64, generator=generator)
    return 2 * draw(), 2 * draw()


def tokens(ids: torch.Tensor) -> Tokens:
    return Tokens(ids, torch.zeros_like(ids), torch.ones(len(ids)))


def test_closed_forms_on_two_tokens():
    s, t = torch.tensor([[0.25, 0.75]]).double(), torch.tensor([[0.5, 0.5]]).double()
    fkl = 0.5 * torch.log(torch.tensor(2.0)).double() + 0.5 * torch.log(torch.tensor(2 / 3)).double()
    rkl = 0.25 * torch.log(torch.tensor(0.5)).double() + 0.75 * torch.log(torch.tensor(1.5)).double()
    torch.testing.assert_close(forward_kl(s.log(), t.log()).sum(), fkl)
    torch.testing.assert_close(reverse_kl(s.log(), t.log()).sum(), rkl)
    m = 0.5 * (s + t)
    expected = 0.5 * (t * (t / m).log()).sum() + 0.5 * (s * (s / m).log()).sum()
    torch.testing.assert_close(jsd(s.log(), t.log()).sum(), expected)


@each
def test_gradcheck(divergence):
    student, teacher = pair()
    log_t = teacher.log_softmax(-1)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), log_t).sum(-1), student)


@each
def test_zero_value_and_gradient_where_student_equals_teacher(divergence):
    student, _ = pair()
    log_t = student.log_softmax(-1)
    student.requires_grad_()
    value = divergence(student.log_softmax(-1), log_t).sum(-1)
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-14 and slope.abs().max() < 1e-14


@each
def test_non_negative_and_blind_to_a_constant_added_to_logits(divergence):
    student, teacher = pair(n=200)
    value = divergence(student.log_softmax(-1), teacher.log_softmax(-1)).sum(-1)
    moved = divergence((student + 3.7).log_softmax(-1), (teacher - 11.0).log_softmax(-1)).sum(-1)
    assert (value >= 0).all()
    torch.testing.assert_close(value, moved)


def test_swapping_roles_swaps_the_directions():
    student, teacher = (x.log_softmax(-1) for x in pair())
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    torch.testing.assert_close(jsd(student, teacher, 0.3).sum(-1), jsd(teacher, student, 0.7).sum(-1))


def test_interior_jsd_tends_to_zero_scale_at_the_ends():
    """The convention that the docstring states: the endpoints are KLs, the interior vanishes towards them."""
    student, teacher = (x.log_softmax(-1) for x in pair())
    near, end = jsd(student, teacher, 1e-4).sum(-1), jsd(student, teacher, 0.0).sum(-1)
    assert (near < 1e-3 * end).all()
    torch.testing.assert_close(near / 1e-4, end, rtol=1e-2, atol=0)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside_its_range_is_refused(beta):
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"loss\.divergence\.beta"):
        jsd(student, teacher, beta)


@each
def test_tokens_that_one_side_rules_out_give_limits_not_nan(divergence):
    student, teacher = pair(n=2)
    teacher[:, 0] = -torch.inf
    student.requires_grad_()
    entries = divergence(student.log_softmax(-1), teacher.log_softmax(-1))
    assert not entries.isnan().any()
    if divergence in (forward_kl, jsd):  # reverse KL is rightly infinite there
        (slope,) = torch.autograd.grad(entries.sum(), student)
        assert slope.isfinite().all()


@each
def test_the_sampled_token_is_unbiased(divergence):
    """Summed over all tokens with the student's probabilities, its gradient is the exact one."""
    student, teacher = pair(n=1)
    log_t = teacher.log_softmax(-1)
    student.requires_grad_()
    (exact,) = torch.autograd.grad(
        FullVocabulary()(divergence, student.log_softmax(-1), FullLogProbs(log_t), tokens(torch.tensor([0]))), student
    )
    expected = torch.zeros_like(exact)
    for y, p in enumerate(student.detach().softmax(-1)[0]):
        loss = SampledToken()(divergence, student.log_softmax(-1), FullLogProbs(log_t), tokens(torch.tensor([y])))
        (slope,) = torch.autograd.grad(loss, student)
        expected += p * slope
    torch.testing.assert_close(expected, exact)


def test_the_sampled_token_of_reverse_kl_is_the_negative_advantage_of_the_cookbook():
    student, teacher = (x.log_softmax(-1) for x in pair())
    ids = torch.tensor([0, 1, 2, 3, 4])
    chosen = lambda x: x.gather(1, ids[:, None]).squeeze(1)  # noqa: E731
    loss = SampledToken()(reverse_kl, student, FullLogProbs(teacher), tokens(ids))
    torch.testing.assert_close(loss, (chosen(student) - chosen(teacher)) * chosen(student))


OF_TAIL = [(of, tail) for of in ("teacher", "student") for tail in (True, False)]


@each
@pytest.mark.parametrize(("of", "tail"), OF_TAIL)
def test_top_k_is_exact_at_k_equal_v_and_has_gradients_that_check(divergence, of, tail):
    student, teacher = pair()
    log_t, ids = teacher.log_softmax(-1), tokens(torch.zeros(5, dtype=torch.long))
    full = divergence(student.log_softmax(-1), log_t).sum(-1)
    torch.testing.assert_close(TopK(7, of, tail)(divergence, student.log_softmax(-1), FullLogProbs(log_t), ids), full)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: TopK(3, of, tail)(divergence, x.log_softmax(-1), FullLogProbs(log_t), ids), student
    )


@each
@pytest.mark.parametrize(("of", "tail"), OF_TAIL)
def test_top_k_is_zero_without_gradient_where_student_equals_teacher(divergence, of, tail):
    student, _ = pair()
    log_t, ids = student.log_softmax(-1), tokens(torch.zeros(5, dtype=torch.long))
    student.requires_grad_()
    value = TopK(3, of, tail)(divergence, student.log_softmax(-1), FullLogProbs(log_t), ids)
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-14 and slope.abs().max() < 1e-14


@each
def test_the_tail_bucket_never_exceeds_the_exact_divergence_and_grows_with_k(divergence):
    """The data-processing inequality; nested supports of the teacher refine each other."""
    student, teacher = pair(n=300)
    log_s, log_t, ids = student.log_softmax(-1), teacher.log_softmax(-1), tokens(torch.zeros(300, dtype=torch.long))
    values = [TopK(k)(divergence, log_s, FullLogProbs(log_t), ids) for k in (1, 2, 4, 6)]
    values.append(divergence(log_s, log_t).sum(-1))
    for smaller, larger in pairwise(values):
        assert (smaller <= larger + 1e-12).all() and (smaller >= 0).all()


@pytest.mark.parametrize(
    ("options", "field"),
    [({"k": 0}, "k=0"), ({"k": 2, "of": "both"}, "of='both'"), ({"k": 2, "tail_bucket": "drop"}, "tail_bucket='drop'")],
)
def test_bad_supports_are_refused(options, field):
    with pytest.raises(ValueError, match=rf"loss\.vocab_support\.{field}"):
        TopK(**options)
    student, teacher = (x.log_softmax(-1) for x in pair())
    with pytest.raises(ValueError, match=r"loss\.vocab_support\.k=8 exceeds the 7 tokens that are compared"):
        TopK(8)(reverse_kl, student, FullLogProbs(teacher), tokens(torch.zeros(5, dtype=torch.long)))
