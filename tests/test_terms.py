"""Small parts by hand: advantages, weights, aggregates, the optimizer's noun, step metrics, metrics.csv."""

import pytest
import torch

from opd_lightning.data.batching import pack
from opd_lightning.losses import Objective
from opd_lightning.losses.advantages import group_relative, leave_one_out, reinforce
from opd_lightning.losses.divergences import reverse_kl
from opd_lightning.losses.policy_gradient import CrossEntropy, PolicyGradient
from opd_lightning.losses.targets import FullLogits, FullLogProbs
from opd_lightning.losses.token_weights import completion_mask, constant, sequence_mean, skip_first, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken
from opd_lightning.models.optimizer import Optim
from opd_lightning.rollout.base import single_turn
from opd_lightning.runs.metrics_file import MetricsFile, read_csv
from opd_lightning.teachers.contexts import PrivilegedContext
from opd_lightning.types import Completion, Rendered, Tokens
from opd_lightning.utils.metrics import StepMetrics


def packed(lengths=(3, 1), counts=(True, True)) -> Tokens:
    """The tokens of samples of these lengths; those that do not count were cut off, and are masked for it."""
    samples = [
        single_turn(None, i, Rendered([5]), Completion([0] * n, "stop" if counted else "length"), "student", True)
        for i, (n, counted) in enumerate(zip(lengths, counts, strict=True))
    ]
    return pack(samples, torch.device("cpu"))


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    std = torch.tensor([1.0, 0.0, 0.0, 1.0]).std()
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]) / torch.tensor([[std + 1e-4], [1.0]])
    torch.testing.assert_close(group_relative(rewards), expected)
    torch.testing.assert_close(group_relative(rewards, scale_by_std=False)[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    with pytest.raises(ValueError, match="num_generations=1"):
        group_relative(rewards[:, :1])


def test_leave_one_out_and_batch_baselines_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(leave_one_out(rewards)[0], torch.tensor([1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5]))
    assert (leave_one_out(rewards)[1] == 0).all()
    others = [(rewards.sum() - r) / 5 for r in rewards.flatten()]
    torch.testing.assert_close(reinforce(rewards).flatten(), rewards.flatten() - torch.stack(others))
    assert reinforce(rewards, baseline=False) is rewards and (reinforce(torch.full((3, 1), 0.7)) == 0).all()
    with pytest.raises(ValueError, match="num_generations=1"):
        leave_one_out(rewards[:, :1])
    with pytest.raises(ValueError, match=r"data\.batch_size=1"):
        reinforce(rewards[:1, :1])


@pytest.mark.parametrize("advantage", [reinforce, leave_one_out])
def test_baselines_leave_the_policy_gradient_unbiased(advantage):
    """The expectation of A grad log p over all outcomes of three independent draws is the gradient of the expected reward."""
    logits = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, 0.0], dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * reward).sum(), logits, retain_graph=True)
    total = torch.zeros(())
    for draw in torch.cartesian_prod(*[torch.arange(3)] * 3):
        gain = (advantage(reward[draw][None])[0] * log_p[draw]).mean()
        total = total + log_p[draw].sum().exp().detach() * gain
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, exact)


def test_without_a_clip_the_first_update_is_reinforce():
    log_s = torch.log(torch.tensor([[0.4, 0.6]])).requires_grad_()
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1), advantage=torch.tensor([3.0]))
    loss, stats = PolicyGradient(reinforce, clip=None)(log_s, tokens)
    (slope,) = torch.autograd.grad(loss.sum(), log_s)
    assert slope.tolist() == [[-3.0, 0.0]] and "clip_fraction" not in stats


@pytest.mark.parametrize(("sampler", "expected"), [(0.4, 1.0), (0.8, 0.5), (0.1, 2.0)])
def test_the_sampler_ratio_is_truncated_and_scales_the_gradient(sampler, expected):
    """The policy gives 0.4; a sampler that gave 0.1 would weigh 4, and the cap says 2."""
    log_s = torch.log(torch.tensor([[0.4, 0.6]])).requires_grad_()
    known = {"advantage": torch.tensor([1.0]), "sampler_logprob": torch.log(torch.tensor([sampler]))}
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1), **known)
    loss, stats = PolicyGradient(group_relative, importance_sampling_cap=2.0)(log_s, tokens)
    (slope,) = torch.autograd.grad(loss.sum(), log_s, retain_graph=True)
    torch.testing.assert_close(stats["sampler_ratio"], torch.tensor([expected]))
    torch.testing.assert_close(slope, torch.tensor([[-expected, 0.0]]))
    target = FullLogProbs(torch.log(torch.tensor([[0.5, 0.5]])))
    capped, plain = (SampledToken(cap)(reverse_kl, log_s, target, tokens) for cap in (2.0, None))
    torch.testing.assert_close(capped, expected * plain)
    with pytest.raises(ValueError, match=r"loss\.policy_gradient\.importance_sampling_cap=0\.5"):
        PolicyGradient(group_relative, importance_sampling_cap=0.5)


def test_terms_add_up_with_their_coefficients():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator)
    targets = {name: FullLogits(torch.randn(4, 6, generator=generator)) for name in ("teacher", "reference")}
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.0])
    tokens = Tokens(torch.tensor([1, 2, 3, 4]), torch.arange(4), torch.ones(4), advantage=advantage)
    parts = {
        "divergence": {"divergence": reverse_kl, "vocab_support": FullVocabulary()},
        "policy_gradient": {"policy_gradient": PolicyGradient(group_relative)},
        "cross_entropy": {"cross_entropy": CrossEntropy()},
    }
    alone = {name: Objective(completion_mask, token_mean, **term)(logits, targets, tokens)[0] for name, term in parts.items()}
    weights = {"divergence": 0.5, "policy_gradient": 2.0, "cross_entropy": 0.25, "reference": 3.0}
    together = {key: value for terms in parts.values() for key, value in terms.items()}
    objective = Objective(completion_mask, token_mean, **together, reference=reverse_kl, coefficients=weights)
    loss, stats = objective(logits, targets, tokens)
    expected = sum(weights[name] * value for name, value in alone.items()) + 3.0 * stats["reference_kl"]
    torch.testing.assert_close(loss, expected)
    assert objective.teachers == {"teacher", "reference"} and "cross_entropy_loss" in stats


@pytest.mark.parametrize(("name", "value"), [("divergance", 1.0), ("reference", -0.1)])
def test_bad_coefficients_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"loss\.coefficients\.{name}="):
        Objective(completion_mask, token_mean, cross_entropy=CrossEntropy(), coefficients={name: value})


@pytest.mark.parametrize(
    ("advantage", "ratio", "active"), [(1.0, 1.5, True), (1.0, 0.5, False), (-1.0, 0.5, True), (-1.0, 1.5, False)]
)
def test_the_clip_stops_gains_and_never_losses(advantage, ratio, active):
    """PPO's min: a step that has gone far enough in the good direction has no gradient left."""
    log_s = torch.log(torch.tensor([[0.4, 0.6]])).requires_grad_()
    old = log_s.detach()[0, :1] - torch.log(torch.tensor(ratio))
    known = {"advantage": torch.tensor([advantage]), "old_logprob": old}
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1), **known)
    loss, stats = PolicyGradient(group_relative, clip=0.2)(log_s, tokens)
    (slope,) = torch.autograd.grad(loss.sum(), log_s)
    assert bool(stats["clip_fraction"]) == active and (slope.abs().max() == 0) == active
    higher = PolicyGradient(group_relative, clip=0.2, clip_high=0.6)(log_s, tokens)[1]
    assert bool(higher["clip_fraction"]) == (active and advantage < 0)


def test_weights_and_aggregates_by_hand():
    tokens = packed()
    assert tokens.sample.tolist() == [0, 0, 0, 1] and tokens.position.tolist() == [0, 1, 2, 0]
    mask, sample = completion_mask(tokens), tokens.sample
    assert mask.tolist() == [1, 1, 1, 1]
    assert skip_first(tokens, 2).tolist() == [0, 0, 1, 0]
    assert completion_mask(packed(counts=(False, True))).tolist() == [0, 0, 0, 1]
    assert token_mean(mask, sample, 2)[1] == 4 and constant(mask, sample, 2, 10)[1] == 20
    weight, z = sequence_mean(mask, sample, 2)
    torch.testing.assert_close(torch.stack([weight[sample == b].sum() for b in range(2)]), torch.ones(2))
    assert z == 2 and sequence_mean(skip_first(tokens, 2), sample, 2)[1] == 1
    with pytest.raises(ValueError, match=r"loss\.weight\.n=-1"):
        skip_first(tokens, -1)
    with pytest.raises(ValueError, match=r"loss\.aggregate\.tokens=0"):
        constant(mask, sample, 2, 0)


def test_the_schedule_is_that_of_transformers():
    layer = torch.nn.Linear(2, 2)
    optimizer, schedule = Optim(torch.optim.SGD, lr=1.0, schedule="linear", warmup_steps=2).build(layer.parameters(), 6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])


def test_the_clip_reports_the_norm_before():
    layer = torch.nn.Linear(1, 1, bias=False)
    for clip, after in ((1.0, 1.0), (None, 3.0)):
        layer.weight.grad = torch.full((1, 1), 3.0)
        assert Optim(torch.optim.SGD, lr=1.0, clip_norm=clip).clip(layer.parameters()) == 3.0
        assert layer.weight.grad.item() == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"lr": 0}, "lr"), ({"lr": 1, "clip_norm": 0}, "clip_norm"), ({"lr": 1, "warmup_steps": -1}, "warmup_steps")],
)
def test_bad_optimizer_options_are_refused_by_name(options, field):
    with pytest.raises(ValueError, match=rf"optim\.{field}="):
        Optim(torch.optim.SGD, **options)


def test_step_metrics_are_means_over_what_counts_on_all_devices():
    metrics = StepMetrics()
    metrics.mean("a", torch.tensor([1.0, 5.0]), torch.tensor([True, False]))
    metrics.mean("a", torch.tensor(4.0))
    metrics.mean("none", torch.ones(2), torch.zeros(2).bool())
    metrics.total("n", torch.tensor([1, 2]))
    assert metrics.reduce(lambda x: 2 * x) == ({"a": 2.5}, {"n": 6.0})


def test_a_nan_outside_the_mask_does_not_reach_the_mean():
    metrics = StepMetrics()
    metrics.mean("a", torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    assert metrics.reduce(lambda x: x)[0] == {"a": 1.0}


def test_metrics_csv_holds_each_step_once_and_takes_new_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.log_metrics({"loss": 1.0 / step, "epoch": 0}, step)
        file.save()
    file.log_metrics({"eval": 0.5}, 3)
    file.save()
    again = MetricsFile(path)
    again.drop_after(2)
    again.log_metrics({"loss": 9.0, "new": 1.0}, 3)
    again.finalize("finished")
    assert read_csv(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0, "new": 1.0}]


@pytest.mark.parametrize("template", ["{prompt}", "{prompt} {demonstration} {solution}", "{prompt} {demonstration"])
def test_bad_templates_are_refused(template):
    with pytest.raises(ValueError, match=r"context\.template="):
        PrivilegedContext("demonstration", template)
