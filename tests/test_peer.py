"""Equal to a peer: values and gradients of TRL 1.16.0's divergence kernel, recorded, and live where TRL is installed."""

import pytest
import torch

from opd_lightning.losses import Head, Objective, head_loss
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.types import Tokens

DIVERGENCES = {0.0: forward_kl, 0.5: jsd, 1.0: reverse_kl}
SHAPES = {"plain": (1.0, 1.0, None, 1.0, None), "shaped": (1.3, 0.7, 2.0, 1.2, 1.5)}
"""Temperature; scale and cap of the student's logits, of the teacher's."""

RECORDED = {  # divergence per token, norm of the gradient on hidden states, that on the weight, gradient on the bias
    ("plain", 0.0): (
        [0.280591, 2.355152, 5.968184],
        5.921,
        2.725259,
        [-0.628901, 0.032814, -0.538369, -0.135071, 1.767107, -0.774013, 0.276434],
    ),
    ("plain", 0.5): (
        [0.062365, 0.424251, 0.641117],
        0.314058,
        0.25514,
        [-0.044673, -0.001133, -0.116577, -0.005636, 0.158891, -0.00284, 0.011967],
    ),
    ("plain", 1.0): (
        [0.242275, 2.140433, 6.456191],
        1.837082,
        1.58236,
        [-0.220967, -0.148182, -0.680101, -0.028739, 1.039318, -0.009681, 0.048353],
    ),
    ("shaped", 0.0): (
        [0.054854, 0.401939, 1.388895],
        0.98006,
        0.389889,
        [-0.238091, 0.057084, 0.013083, -0.078318, 0.088765, -0.053771, 0.103877],
    ),
    ("shaped", 0.5): (
        [0.013688, 0.095747, 0.297595],
        0.178974,
        0.07693,
        [-0.050015, 0.005766, -0.008181, -0.010919, 0.016936, -0.006162, 0.021064],
    ),
    ("shaped", 1.0): (
        [0.055456, 0.421278, 1.441843],
        0.823137,
        0.376377,
        [-0.213735, -0.023546, -0.09245, -0.044873, 0.085692, -0.022179, 0.132453],
    ),
}


def grid(*shape: int, k: float) -> torch.Tensor:
    """Numbers that no generator is needed for."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float32) * k + 0.3).reshape(shape)


def inputs() -> tuple[torch.Tensor, ...]:
    hidden, weight, bias = grid(3, 4, k=1.7), 2 * grid(7, 4, k=0.9), grid(7, k=2.1)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grid(3, 5, k=1.1), 2 * grid(7, 5, k=0.7)


def ours(shape: str, beta: float) -> tuple[torch.Tensor, ...]:
    """Divergence per token, and gradients of their sum on hidden states, weight and bias."""
    temperature, scale, cap, teacher_scale, teacher_cap = SHAPES[shape]
    hidden, weight, bias, theirs, their_weight = inputs()
    loss = Objective(completion_mask, token_mean, DIVERGENCES[beta], FullVocabulary(), temperature=temperature)
    scores = HiddenScores(theirs, Head(their_weight, scale=teacher_scale, softcap=teacher_cap).project, 7)
    tokens = Tokens(torch.zeros(3, dtype=torch.long), torch.arange(3), torch.ones(3))
    value, stats = head_loss(hidden, Head(weight, bias, scale=scale, softcap=cap), tokens, {"teacher": scores}, loss, 2)
    return stats["loss"], *torch.autograd.grad(value, (hidden, weight, bias))


@pytest.mark.parametrize(("shape", "beta"), RECORDED)
def test_recorded_values_and_gradients(shape, beta):
    divergence, hidden, weight, bias = ours(shape, beta)
    recorded = RECORDED[shape, beta]
    torch.testing.assert_close(divergence, torch.tensor(recorded[0]), rtol=2e-5, atol=2e-6)
    assert hidden.norm().item() == pytest.approx(recorded[1], rel=2e-5)
    assert weight.norm().item() == pytest.approx(recorded[2], rel=2e-5)
    torch.testing.assert_close(bias, torch.tensor(recorded[3]), rtol=5e-5, atol=2e-6)


@pytest.mark.parametrize(("shape", "beta"), RECORDED)
def test_live_values_and_gradients(shape, beta):
    kernel = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    temperature, scale, cap, teacher_scale, teacher_cap = SHAPES[shape]
    hidden, weight, bias, theirs, their_weight = inputs()
    shaped = (temperature, scale, cap, teacher_scale, teacher_cap)
    divergence, _ = kernel.apply(hidden, weight, bias, theirs, their_weight, None, beta, *shaped)
    expected = (divergence, *torch.autograd.grad(divergence.sum(), (hidden, weight, bias)))
    for a, b in zip(ours(shape, beta), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=2e-6)
