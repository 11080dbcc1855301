"""The head: equal to the plain loss on full logits, whatever the chunk, with gradients made in the forward pass."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.nn.functional import linear

from opd_lightning.losses import Head, Objective, head_loss
from opd_lightning.losses.clip import ClipEntries, ClipPositions
from opd_lightning.losses.divergences import (
    EntropyAware,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from opd_lightning.losses.head import NotFinite
from opd_lightning.losses.policy_gradient import CrossEntropy
from opd_lightning.losses.targets import FullLogits, HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK, TopKSampledTail
from opd_lightning.types import Tokens

N, H, V = 11, 6, 13


def parts(dtype=torch.float64, bias=False, n=N, h=H, v=V):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)  # noqa: E731
    hidden, weight, teacher_hidden, teacher_weight = draw(n, h), draw(v, h), draw(n, 4), draw(v, 4)
    tokens = Tokens(torch.arange(n) % v, torch.arange(n), torch.rand(n, generator=generator))
    scores = HiddenScores(teacher_hidden, Head(teacher_weight).project, v)
    return hidden.requires_grad_(), weight.requires_grad_(), draw(v).requires_grad_() if bias else None, tokens, scores


def objective():
    return Objective(
        completion_mask, token_mean, divergence=reverse_kl, vocab_support=FullVocabulary(), cross_entropy=CrossEntropy()
    )


def naive(hidden, weight, bias, tokens, scores):
    student = torch.nn.functional.linear(hidden, weight, bias)
    loss, _ = objective()(student, {"teacher": FullLogits(scores.project(scores.hidden))}, tokens)
    return (tokens.weight.to(loss.dtype) * loss).sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_equals_the_plain_loss_for_any_chunk(chunk, bias):
    hidden, weight, b, tokens, scores = parts(bias=bias)
    inputs = [x for x in (hidden, weight, b) if x is not None]
    expected = naive(hidden, weight, b, tokens, scores)
    value, stats = head_loss(hidden, Head(weight, b), tokens, {"teacher": scores}, objective(), chunk)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for ours, plain in zip(torch.autograd.grad(3 * value, inputs), torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert {"loss", "reverse_kl", "forward_kl", "top1_agreement"} <= set(stats) and stats["loss"].shape == (N,)


def test_gradcheck():
    hidden, weight, bias, tokens, scores = parts(bias=True)
    function = lambda h, w, b: head_loss(h, Head(w, b), tokens, {"teacher": scores}, objective(), 4)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_tied_weights_add_up():
    """The head's weight is also the embedding that made the hidden states."""
    _, weight, _, tokens, scores = parts()
    ids = torch.arange(N) % V
    expected = torch.autograd.grad(naive(weight[ids].tanh(), weight, None, tokens, scores), weight)
    value, _ = head_loss(weight[ids].tanh(), Head(weight), tokens, {"teacher": scores}, objective(), 4)
    torch.testing.assert_close(torch.autograd.grad(value, weight), expected)


def test_a_frozen_head_gets_no_gradient_and_no_work():
    hidden, weight, _, tokens, scores = parts()
    value, _ = head_loss(hidden, Head(weight.detach()), tokens, {"teacher": scores}, objective(), 4)
    value.backward()
    assert hidden.grad is not None and weight.grad is None


def test_without_gradients_it_only_measures():
    hidden, weight, _, tokens, scores = parts()
    with torch.no_grad():
        value, stats = head_loss(hidden, Head(weight), tokens, {"teacher": scores}, objective(), 4)
    assert not value.requires_grad and not stats["loss"].requires_grad


def test_zero_weights_give_an_exact_zero_that_is_still_part_of_the_graph():
    hidden, weight, _, tokens, scores = parts()
    value, _ = head_loss(hidden, Head(weight), tokens.scaled(0.0), {"teacher": scores}, objective(), 4)
    value.backward()
    assert value == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_no_tokens_give_a_graph_anchored_zero():
    hidden, weight, _, tokens, scores = parts()
    none = slice(0, 0)
    value, stats = head_loss(hidden[none], Head(weight), tokens.take(none), {"teacher": scores.take(none)}, objective(), 4)
    value.backward()
    assert value == 0 and weight.grad.abs().max() == 0 and stats == {}


def test_bfloat16_products_keep_float32_losses_and_gradients_of_the_parameters_dtype():
    hidden, weight, _, tokens, scores = parts(torch.float32)
    exact = torch.autograd.grad(naive(hidden, weight, None, tokens, scores), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, stats = head_loss(hidden, Head(weight), tokens, {"teacher": scores}, objective(), 4)
    assert value.dtype == torch.float32 and stats["loss"].dtype == torch.float32
    for ours, plain in zip(torch.autograd.grad(value, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - plain).norm() / plain.norm() < 5e-2


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd_low": partial(jsd, beta=0.1),
    "jsd_0": partial(jsd, beta=0.0),
    "skew_forward": partial(skew_forward_kl, alpha=0.2),
    "skew_reverse": partial(skew_reverse_kl, alpha=0.2),
    "total_variation": total_variation,
    "entropy_aware": EntropyAware(threshold=1.5),
}
SUPPORTS = {
    "full": FullVocabulary(),
    "top_teacher": TopK(4),
    "top_student": TopK(4, "student"),
    "renormalised": TopK(4, tail_bucket=False),
    "sampled": SampledToken(),
    "sampled_baseline": SampledToken(baseline=True),
    "sampled_clipped": SampledToken(cost_limit=1.0, clip=0.2),
    "sampled_tail": TopKSampledTail(3),
}
CLIPS = {"none": None, "entries": ClipEntries(0.05), "positions": ClipPositions(0.5)}
GRID = [
    (d, s, c)
    for d, s, c in product(DIVERGENCES, SUPPORTS, CLIPS)
    if not (s.startswith("sampled") and (c != "none" or d == "entropy_aware"))
]


@pytest.mark.parametrize(("divergence", "support", "clip"), GRID)
def test_gradcheck_of_every_divergence_support_and_clip(divergence, support, clip):
    """In float64 through the head, with a ratio on top where the support takes one.

    A sampled token's loss is a surrogate whose value is not what its gradient belongs to, so it is compared with autograd on
    full logits; positions are clipped with a constant scale, so there, too. The others are checked numerically.
    """
    hidden, weight, bias, tokens, scores = parts(bias=True, n=3, h=2, v=6)
    tokens = Tokens(tokens.ids, tokens.position, tokens.weight, old_logprob=torch.full((3,), -2.5, dtype=torch.float64))
    ratio = None if support.startswith("sampled") else 2.0
    options = {
        "divergence": DIVERGENCES[divergence],
        "vocab_support": SUPPORTS[support],
        "clip": CLIPS[clip],
        "ratio_cap": ratio,
    }
    loss = Objective(completion_mask, token_mean, **options, temperature=1.3)
    through = lambda h, w, b: head_loss(h, Head(w, b), tokens, {"teacher": scores}, loss, 2)[0]  # noqa: E731
    ours = torch.autograd.grad(through(hidden, weight, bias), (hidden, weight, bias))
    targets = {"teacher": FullLogits(scores.project(scores.hidden))}
    whole = (tokens.weight.double() * loss(linear(hidden, weight, bias), targets, tokens)[0]).sum()
    for a, b in zip(ours, torch.autograd.grad(whole, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if support.startswith("sampled") or clip == "positions":
        return
    without = Objective(completion_mask, token_mean, **{**options, "ratio_cap": None}, temperature=1.3)
    plain = lambda h, w, b: head_loss(h, Head(w, b), tokens, {"teacher": scores}, without, 2)[0]  # noqa: E731
    assert torch.autograd.gradcheck(plain, (hidden, weight, bias), nondet_tol=1e-12)


def capped(product, scale, softcap):
    logits = product * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (1.7, 3.0)])
@pytest.mark.parametrize(("temperature", "squared"), [(1.0, False), (1.7, True)])
def test_scaled_and_capped_heads_equal_autograd_on_full_logits(name, scale, softcap, temperature, squared):
    """Student and teacher each with their own; closed forms and the generic path."""
    hidden, weight, bias, tokens, scores = parts(bias=True)
    teacher = Head(torch.randn(V, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), scale=0.6, softcap=5.0)
    scores = HiddenScores(scores.hidden, teacher.project, V)
    loss = Objective(
        completion_mask,
        token_mean,
        DIVERGENCES[name],
        FullVocabulary(),
        temperature=temperature,
        temperature_squared=squared,
        coefficients={"divergence": 0.7},
    )
    value, stats = head_loss(hidden, Head(weight, bias, scale=scale, softcap=softcap), tokens, {"teacher": scores}, loss, 4)
    targets = {"teacher": FullLogits(capped(linear(scores.hidden, teacher.weight), 0.6, 5.0))}
    per_token, expected_stats = loss(capped(linear(hidden, weight, bias), scale, softcap), targets, tokens)
    expected = (tokens.weight.double() * per_token).sum()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    grads = (torch.autograd.grad(x, (hidden, weight, bias)) for x in (value, expected))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    for key, column in expected_stats.items():
        torch.testing.assert_close(stats[key], column, rtol=1e-8, atol=1e-10)
    if squared:
        assert per_token.detach().sum() > 0


@pytest.mark.parametrize("wider", ["student", "teacher"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "total_variation"])
def test_vocabularies_padded_differently_are_compared_on_the_ids_they_share(wider, name):
    """No id is given a logit that no model has; padding gets no gradient."""
    hidden, weight, _, tokens, scores = parts()
    ids = torch.arange(N) % (V - 3)
    tokens = Tokens(ids, tokens.position, tokens.weight)
    teacher = torch.randn(V, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (V, V - 3) if wider == "student" else (V - 3, V)
    loss = Objective(completion_mask, token_mean, DIVERGENCES[name], FullVocabulary())
    scores = HiddenScores(scores.hidden, Head(teacher[:theirs]).project, theirs)
    head = weight[:ours].detach().requires_grad_()
    value, _ = head_loss(hidden, Head(head), tokens, {"teacher": scores}, loss, 4)
    targets = {"teacher": FullLogits(linear(scores.hidden, teacher[: V - 3]))}
    expected = (tokens.weight.double() * loss(linear(hidden, head[: V - 3]), targets, tokens)[0]).sum()
    grads = [torch.autograd.grad(x, (hidden, head)) for x in (value, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (grads[0][1][V - 3 :] == 0).all()


def test_two_backward_calls_give_the_gradient_twice():
    hidden, weight, _, tokens, scores = parts()
    value, _ = head_loss(hidden, Head(weight), tokens, {"teacher": scores}, objective(), 4)
    value.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    value.backward()
    torch.testing.assert_close(hidden.grad, 2 * once[0])
    torch.testing.assert_close(weight.grad, 2 * once[1])


def test_the_order_of_tokens_does_not_matter():
    hidden, weight, _, tokens, scores = parts()
    loss = Objective(completion_mask, token_mean, reverse_kl, FullVocabulary())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    straight, _ = head_loss(hidden, Head(weight), tokens, {"teacher": scores}, loss, 4)
    shuffled, _ = head_loss(hidden[order], Head(weight), tokens.take(order), {"teacher": scores.take(order)}, loss, 4)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (straight, shuffled)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(straight, shuffled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", [reverse_kl, total_variation])
def test_logits_that_are_not_finite_are_refused(side, value, divergence):
    hidden, weight, _, tokens, scores = parts()
    with torch.no_grad():
        (hidden if side == "student" else scores.hidden)[2, 1] = value
    loss = Objective(completion_mask, token_mean, divergence, FullVocabulary())
    with pytest.raises(NotFinite, match=r"the loss of 1 of 11 tokens is not finite"):
        head_loss(hidden, Head(weight), tokens, {"teacher": scores}, loss, 4)


def test_closed_forms_survive_probabilities_that_underflow():
    """Logits 200 apart in float32: no NaN, and zero slope where student and teacher agree."""
    s = torch.tensor([[200.0, 0.0, -200.0], [0.0, 200.0, 0.0]]).requires_grad_()
    for divergence in (forward_kl, reverse_kl, jsd):
        loss = Objective(completion_mask, token_mean, divergence, FullVocabulary())
        for t, same in ((s.detach(), True), (s.detach().flip(1), False)):
            tokens = Tokens(torch.zeros(2, dtype=torch.long), torch.arange(2), torch.ones(2))
            scores = HiddenScores(t, lambda h, out=None: h.clone(), 3)
            value, _ = head_loss(s, Head(torch.eye(3)), tokens, {"teacher": scores}, loss)
            (slope,) = torch.autograd.grad(value, s)
            assert value.isfinite() and slope.isfinite().all() and (not same or (value == 0 and slope.abs().max() == 0))
