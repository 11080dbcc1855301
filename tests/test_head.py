"""The head: equal to the plain loss on full logits, whatever the chunk, with gradients made in the forward pass."""

import pytest
import torch

from opd_lightning.losses import Head, Objective, head_loss
from opd_lightning.losses.divergence import reverse_kl
from opd_lightning.losses.support import FullVocabulary
from opd_lightning.losses.terms import CrossEntropy
from opd_lightning.losses.weight import completion_mask, token_mean
from opd_lightning.types import LogitSource, Tokens

N, H, V = 11, 6, 13


def parts(dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)  # noqa: E731
    hidden, weight, teacher_hidden, teacher_weight = draw(N, H), draw(V, H), draw(N, 4), draw(V, 4)
    tokens = Tokens(torch.arange(N) % V, torch.arange(N), torch.rand(N, generator=generator))
    source = LogitSource(teacher_hidden, Head(teacher_weight).project)
    return hidden.requires_grad_(), weight.requires_grad_(), draw(V).requires_grad_() if bias else None, tokens, source


def objective():
    return Objective(completion_mask, token_mean, divergence=reverse_kl, support=FullVocabulary(), cross_entropy=CrossEntropy())


def naive(hidden, weight, bias, tokens, source):
    student = torch.nn.functional.linear(hidden, weight, bias)
    loss, _ = objective()({"student": student, "teacher": source.project(source.hidden)}, tokens)
    return (tokens.weight.to(loss.dtype) * loss).sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_equals_the_plain_loss_for_any_chunk(chunk, bias):
    hidden, weight, b, tokens, source = parts(bias=bias)
    inputs = [x for x in (hidden, weight, b) if x is not None]
    expected = naive(hidden, weight, b, tokens, source)
    value, stats = head_loss(hidden, Head(weight, b), tokens, {"teacher": source}, objective(), chunk)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for ours, plain in zip(torch.autograd.grad(3 * value, inputs), torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert {"loss", "reverse_kl", "forward_kl", "top1_agreement"} <= set(stats) and stats["loss"].shape == (N,)


def test_gradcheck():
    hidden, weight, bias, tokens, source = parts(bias=True)
    function = lambda h, w, b: head_loss(h, Head(w, b), tokens, {"teacher": source}, objective(), 4)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_tied_weights_add_up():
    """The head's weight is also the embedding that made the hidden states."""
    _, weight, _, tokens, source = parts()
    ids = torch.arange(N) % V
    expected = torch.autograd.grad(naive(weight[ids].tanh(), weight, None, tokens, source), weight)
    value, _ = head_loss(weight[ids].tanh(), Head(weight), tokens, {"teacher": source}, objective(), 4)
    torch.testing.assert_close(torch.autograd.grad(value, weight), expected)


def test_a_frozen_head_gets_no_gradient_and_no_work():
    hidden, weight, _, tokens, source = parts()
    value, _ = head_loss(hidden, Head(weight.detach()), tokens, {"teacher": source}, objective(), 4)
    value.backward()
    assert hidden.grad is not None and weight.grad is None


def test_without_gradients_it_only_measures():
    hidden, weight, _, tokens, source = parts()
    with torch.no_grad():
        value, stats = head_loss(hidden, Head(weight), tokens, {"teacher": source}, objective(), 4)
    assert not value.requires_grad and not stats["loss"].requires_grad


def test_zero_weights_give_an_exact_zero_that_is_still_part_of_the_graph():
    hidden, weight, _, tokens, source = parts()
    value, _ = head_loss(hidden, Head(weight), tokens.scaled(0.0), {"teacher": source}, objective(), 4)
    value.backward()
    assert value == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_no_tokens_give_a_graph_anchored_zero():
    hidden, weight, _, tokens, source = parts()
    none = slice(0, 0)
    value, stats = head_loss(hidden[none], Head(weight), tokens.take(none), {"teacher": source.take(none)}, objective(), 4)
    value.backward()
    assert value == 0 and weight.grad.abs().max() == 0 and stats == {}


def test_bfloat16_products_keep_float32_losses_and_gradients_of_the_parameters_dtype():
    hidden, weight, _, tokens, source = parts(torch.float32)
    exact = torch.autograd.grad(naive(hidden, weight, None, tokens, source), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, stats = head_loss(hidden, Head(weight), tokens, {"teacher": source}, objective(), 4)
    assert value.dtype == torch.float32 and stats["loss"].dtype == torch.float32
    for ours, plain in zip(torch.autograd.grad(value, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - plain).norm() / plain.norm() < 5e-2
