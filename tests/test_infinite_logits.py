"""Logits of -inf contribute their limit in every path; a loss that is truly infinite is refused with a remedy that works."""

from functools import partial

import pytest
import torch

from opd_lightning.losses import Head, head_loss
from opd_lightning.losses.closed_form import Scratch, generalised_jsd
from opd_lightning.losses.diagnostics import diagnose
from opd_lightning.losses.divergences import (
    EntropyAware,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from opd_lightning.losses.not_finite import NotFinite
from opd_lightning.losses.objective import Objective
from opd_lightning.losses.policy_gradient import CrossEntropy, PolicyGradient
from opd_lightning.losses.targets import FullLogits, FullLogProbs, HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.teachers.mixed import MixedScores
from opd_lightning.types import Tokens

N, V = 5, 7
INF = float("inf")
DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    **{f"jsd_{beta}": partial(jsd, beta=beta) for beta in (0.01, 0.1, 0.5, 0.9)},
    "skew_forward": skew_forward_kl,
    "skew_reverse": skew_reverse_kl,
    "total_variation": total_variation,
    "entropy_aware": EntropyAware(1.0),
}
SUPPORTS = {
    "full": FullVocabulary,
    "tail": lambda: TopK(5),  # all that is left beside the two masked tokens
    "tail_of_the_student": lambda: TopK(5, "student"),
    "sampled": SampledToken,
    "sampled_baseline": lambda: SampledToken(baseline=True),
}


class Generic(Objective):
    """By autograd."""

    closed_form = None  # type: ignore[assignment]


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masked(x: torch.Tensor, *columns: int) -> torch.Tensor:
    return x.index_fill(1, torch.tensor(columns), -INF)


def tokens(weight: torch.Tensor | None = None) -> Tokens:
    ids = torch.arange(N) % 5
    return Tokens(ids, torch.arange(N), torch.ones(N) if weight is None else weight, advantage=torch.linspace(-1, 1, N))


def through_head(s: torch.Tensor, t: torch.Tensor, loss, some: Tokens | None = None):
    """The loss of logits through the head, its slope on the finite ones, and the statistics; a bias makes the mask."""
    hidden = torch.cat([torch.where(s.isfinite(), s, 0.0), torch.ones(N, 1, dtype=s.dtype)], 1).requires_grad_()
    bias = torch.where((s == -INF).all(0), -INF, 0.0).to(s.dtype)
    weight = torch.cat([torch.eye(V, dtype=s.dtype), torch.zeros(V, 1, dtype=s.dtype)], 1)
    scores = HiddenScores(t, lambda h, out=None: h.clone(), V)
    value, stats = head_loss(hidden, Head(weight, bias), some or tokens(), {"teacher": scores}, loss, 3)
    (slope,) = torch.autograd.grad(value, hidden)
    return value.detach(), slope[:, :V], stats


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", [Objective, Generic])
def test_what_both_rule_out_is_as_if_it_were_not_there(name, support, kind):
    """Value, slope and statistics are those of the vocabulary without the masked tokens, in float64."""
    if support.startswith("sampled") and name == "entropy_aware":
        pytest.skip("refused when it is built")
    made = [cls(completion_mask, token_mean, DIVERGENCES[name], SUPPORTS[support]()) for cls in (kind, Generic)]
    s, t = logits(0), logits(1)
    value, slope, stats = through_head(masked(s, 5, 6), masked(t, 5, 6), made[0])
    leaf = s[:, :5].clone().requires_grad_()
    expected, told = made[1](leaf, {"teacher": FullLogits(t[:, :5])}, tokens())
    (by_autograd,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(value, expected.sum().detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope[:, :5], by_autograd, rtol=1e-9, atol=1e-12)
    assert (slope[:, 5:] == 0).all()
    for key in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(stats[key], told[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Objective, Generic])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_jensen_shannon_divergence_is_finite_whoever_rules_out_what(kind, beta, side):
    """Equal to the limit: a logit so low that its probability is 0."""
    loss = kind(completion_mask, token_mean, partial(jsd, beta=beta), FullVocabulary())
    s, t = logits(0), logits(1)
    one, other = (masked(s, 2, 6), masked(t, 6)) if side == "student" else (masked(s, 6), masked(t, 2, 6))
    value, slope, stats = through_head(one, other, loss)
    low = [torch.where(x == -INF, -800.0, x) for x in (one, other)]
    expected, near, _ = through_head(low[0], low[1], loss)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, near, rtol=1e-9, atol=1e-12)
    assert stats["forward_kl" if side == "student" else "reverse_kl"].isposinf().all(), "a KL that is infinite is logged so"
    assert stats["reverse_kl" if side == "student" else "forward_kl"].isfinite().all()


@pytest.mark.parametrize("kind", [Objective, Generic])
@pytest.mark.parametrize(("name", "side"), [("forward_kl", "student"), ("reverse_kl", "teacher"), ("entropy_aware", "teacher")])
def test_an_infinite_divergence_is_refused_and_the_remedy_works(kind, name, side):
    s, t = (masked(logits(i), 2) if who == side else logits(i) for i, who in enumerate(("student", "teacher")))
    with pytest.raises(NotFinite, match=r"the loss of 5 of 5 tokens.*infinite.*loss/divergence=jsd") as told:
        through_head(s, t, kind(completion_mask, token_mean, DIVERGENCES[name], FullVocabulary()))
    assert "optim.lr" not in str(told.value)
    value, slope, _ = through_head(s, t, kind(completion_mask, token_mean, jsd, FullVocabulary()))
    assert value.isfinite() and slope.isfinite().all()
    opposite = {"forward_kl": reverse_kl}.get(name, forward_kl)
    value, slope, _ = through_head(s, t, kind(completion_mask, token_mean, opposite, FullVocabulary()))
    assert value.isfinite() and slope.isfinite().all(), "the other direction needs nothing there"


def test_the_remedy_is_the_term_s_own():
    s = masked(logits(), 2)
    with pytest.raises(NotFinite, match=r"the loss of 1 of 5 tokens.*Take the mask off the student's logits") as told:
        through_head(s, logits(1), Objective(completion_mask, token_mean, cross_entropy=CrossEntropy()))
    assert "jsd" not in str(told.value)
    both = Objective(
        completion_mask, token_mean, reverse_kl, FullVocabulary(), policy_gradient=PolicyGradient(lambda rewards: rewards)
    )
    with pytest.raises(NotFinite, match="mask off the student's logits, or sample with it") as told:
        through_head(s, logits(1), both)
    assert "jsd" not in str(told.value)


def test_terms_on_written_tokens_do_not_mind_a_mask_elsewhere():
    for more in ({"cross_entropy": CrossEntropy()}, {"policy_gradient": PolicyGradient(lambda rewards: rewards)}):
        loss = Objective(completion_mask, token_mean, **more)
        leaf = logits()[:, :5].requires_grad_()
        expected = loss(leaf, {}, tokens())[0].sum()
        value, slope, _ = through_head(masked(logits(), 5, 6), logits(1), loss)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(slope[:, :5], torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("kind", [Objective, Generic])
def test_a_token_that_counts_nothing_may_be_infinite(kind):
    """Its loss is no reason to stop, and its slope no number to add."""
    t = logits(1)
    t[3, 2] = -INF
    loss = kind(completion_mask, token_mean, reverse_kl, FullVocabulary())
    value, slope, _ = through_head(logits(), t, loss, tokens(torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])))
    assert value.isfinite() and slope.isfinite().all() and (slope[3] == 0).all()


def test_what_does_not_count_in_entropy_aware_may_be_infinite():
    s, t = masked(logits(), 2).log_softmax(-1), logits(1).log_softmax(-1)
    for divergence in (EntropyAware(threshold=100.0), EntropyAware(threshold=0.0, forward=0.0)):
        torch.testing.assert_close(divergence(s, t), reverse_kl(s, t))


@pytest.mark.parametrize("space", ["log", "probability"])
def test_a_mixture_of_teachers_keeps_what_all_rule_out(space):
    parts = [HiddenScores(masked(logits(i), 6), lambda h, out=None: h.clone(), V) for i in (1, 2)]
    found = MixedScores(parts, [0.5, 0.5], space, torch.zeros(len(parts[0].hidden), dtype=torch.long)).chunk(slice(None)).logits
    assert (found[:, 6] == -INF).all() and found[:, :6].isfinite().all()


def test_diagnostics_of_masks_are_limits():
    log_s, log_t = masked(logits(), 6).log_softmax(-1), masked(logits(1), 2, 6).log_softmax(-1)
    found = diagnose(log_s, {"teacher": FullLogProbs(log_t)})
    assert found["forward_kl"].isfinite().all() and found["reverse_kl"].isposinf().all()


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("apart", [1.0, 0.1])
def test_a_small_beta_keeps_its_digits(beta, apart):
    """float32 against float64, value and slope, by the closed form and by autograd."""
    g = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(16, 2048, generator=g)
    t = s + apart * torch.randn(16, 2048, generator=g)
    exact, direction, _ = generalised_jsd(s.double(), t.double(), beta, Scratch())
    value, slope, _ = generalised_jsd(s.clone(), t.clone(), beta, Scratch())
    leaf = s.clone().requires_grad_()
    generic = jsd(leaf.log_softmax(-1), t.log_softmax(-1), beta).sum(-1)
    (by_autograd,) = torch.autograd.grad(generic.sum(), leaf)
    for found in (value, generic.detach()):
        assert ((found - exact).abs() / exact).max() < 1.5e-6 / apart
    for found in (slope, by_autograd):
        assert (found - direction).norm() / direction.norm() < 1e-6 / apart
