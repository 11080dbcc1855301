"""Weights, gates, returns and estimates that read scores and verdicts: closed forms, gradients, and independence of the cut."""

from functools import partial
from itertools import product

import pytest
import torch

from opd_lightning.data.batching import pack
from opd_lightning.losses import Objective
from opd_lightning.losses.advantages import group_relative
from opd_lightning.losses.divergences import Interpolated, forward_kl, jsd, reverse_kl, skew_reverse_kl
from opd_lightning.losses.gates import ByPassRate, BySource, ByVerdict, Confident, Entropy, Evidence, own_probability
from opd_lightning.losses.policy_gradient import CrossEntropy, PolicyGradient, Unlikelihood
from opd_lightning.losses.returns import Returns
from opd_lightning.losses.schedules import Cosine, Linear
from opd_lightning.losses.seeing_weights import by_pass_rate, by_perplexity, by_prefix_gap, important, ranked
from opd_lightning.losses.targets import FullLogits, FullLogProbs, TopKLogProbs
from opd_lightning.losses.token_weights import completion_mask, constant, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopKSampledTail
from opd_lightning.rollout.base import single_turn
from opd_lightning.step.scoring import pass_rates
from opd_lightning.teachers.weights import External, FrozenStart
from opd_lightning.types import Completion, Rendered, Tokens, Verdict
from tests.test_training_step import Ragged, step

V = 5


def batch(lengths=(3, 2, 4, 1), rewards=(1.0, 0.0, 1.0, 1.0), per_prompt=2, **columns) -> Tokens:
    samples = [
        single_turn(None, i // per_prompt, Rendered([5]), Completion([0] * n, "stop"), "student", False)
        for i, n in enumerate(lengths)
    ]
    tokens = pack(samples, torch.device("cpu"))
    reward = torch.tensor(rewards)
    more = {"reward": reward[tokens.sample], "pass_rate": pass_rates(reward, samples)[tokens.sample]}
    return Tokens(**{**{k: v for k, v in vars(tokens).items() if v is not None}, **more, **columns})


def scores(n: int, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, V, generator=generator, dtype=dtype).log_softmax(-1) for _ in range(3)]


def test_the_prefix_weight_falls_with_the_gap_so_far():
    student, teacher = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-2.0, -2.0, -1.0, torch.nan])
    tokens = batch((3, 1), (0.0, 0.0), 1, seen={"student_logprob": student, "teacher_logprob": teacher})
    expected = torch.tensor([1 + 0.5, 1 + 0.5 * (1 - 1 / 3), 1 + 0.5 * (1 - 1 / 3), 1.5])  # a token without a target has no gap
    torch.testing.assert_close(by_prefix_gap(tokens), expected)
    with pytest.raises(ValueError, match=r"loss\.weight\.amplification=-1"):
        by_prefix_gap(tokens, -1.0)


def test_ranks_are_within_completions_and_tip_takes_uncertain_or_contradicted_tokens():
    entropy = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3])
    tokens = batch(
        (3, 2), (0.0, 0.0), 1, seen={"student_entropy": entropy, "forward_kl": torch.tensor([9.0, 0.0, 1.0, 0.0, 0.0])}
    )
    assert ranked(tokens, keep=0.5).tolist() == [0, 1, 1, 0, 1]
    assert ranked(tokens, keep=0.2, lowest=True).tolist() == [1, 0, 0, 1, 0]
    assert important(tokens, keep=0.6).tolist() == [1, 1, 0, 1, 1]  # the first is sure and contradicted, the second unsure
    with pytest.raises(ValueError, match=r"loss\.weight\.keep=0"):
        ranked(tokens, keep=0.0)
    with pytest.raises(ValueError, match=r"loss\.weight reads teacher_entropy"):
        ranked(tokens, by="teacher_entropy")


def test_perplexity_weights_are_scopes():
    """Among the right completions of a prompt by the student's perplexity, among the wrong ones by the teacher's inverse."""
    lengths, rewards = (1, 2, 1, 1), (1.0, 1.0, 0.0, 0.0)
    student = torch.tensor([-1.0, -2.0, -4.0, -9.0, -9.0], dtype=torch.float64)
    teacher = torch.tensor([-9.0, -9.0, -9.0, -1.0, -2.0], dtype=torch.float64)
    tokens = batch(lengths, rewards, 4, seen={"student_logprob": student, "teacher_logprob": teacher})
    weight = by_perplexity(tokens, temperature=2.0)
    right, wrong = torch.tensor([1.0, 3.0]).exp() ** 0.5, torch.tensor([1.0, 2.0]).exp() ** -0.5
    expected = torch.cat([right[:1], right[1:], right[1:]]) / right.sum()
    torch.testing.assert_close(weight, torch.cat([expected, wrong / wrong.sum()]), check_dtype=False)


def test_pass_rates_weigh_prompts():
    tokens = batch((1, 1, 2, 1), (1.0, 0.0, 1.0, 1.0))
    assert tokens.pass_rate.tolist() == [0.5, 0.5, 1, 1, 1]
    assert by_pass_rate(tokens).tolist() == [0.25, 0.25, 0, 0, 0]
    assert by_pass_rate(tokens, 1, 0).tolist() == [0.5, 0.5, 1, 1, 1]


def test_verdicts_route_terms():
    log_s, log_t, _ = scores(10)
    valid = torch.tensor([True] * 4 + [False] + [True] * 5)
    tokens = batch(advantage=torch.ones(10), own=torch.arange(10) < 3)
    target = {"teacher": FullLogProbs(log_t, valid)}
    srpo = ByVerdict({"divergence": 0.0}, {"policy_gradient": 0.0}, untaught={"divergence": 0.0})
    factors = srpo(log_s, target, tokens)
    assert factors["divergence"].tolist() == [0] * 3 + [1, 0] + [0] * 5  # the second token of the wrong answer has no target
    assert factors["policy_gradient"].tolist() == [1] * 3 + [0, 1] + [1] * 5
    hdpo = ByPassRate({}, {"divergence": 0.0}, at_most=0.5)(log_s, target, tokens)
    assert hdpo["divergence"].tolist() == [1] * 5 + [0] * 5
    source = BySource({"cross_entropy": 0.0}, {"divergence": 0.0})(log_s, target, tokens)
    assert source["cross_entropy"].tolist() == [0] * 3 + [1] * 7 and source["divergence"].tolist() == [1] * 3 + [0] * 7
    with pytest.raises(ValueError, match=r"loss\.gate\.right\.divergance=1"):
        ByVerdict({"divergance": 1.0}, {})


def test_gates_of_scores_by_hand():
    log_s, log_t, log_r = scores(3)
    ids = torch.tensor([0, 2, 4])
    tokens = Tokens(ids, torch.arange(3), torch.ones(3), advantage=torch.tensor([1.0, -1.0, 0.0]))
    targets = {"teacher": FullLogProbs(log_t), "reference": FullLogProbs(log_r)}
    own, teacher, other = (x.gather(-1, ids[:, None]).squeeze(1) for x in (log_s, log_t, log_r))
    torch.testing.assert_close(Confident(3.0)(log_s, targets, tokens)["divergence"], (3 * (teacher - own)).sigmoid())
    for to, base in (("student", own), ("reference", other)):
        found = Evidence(0.5, 0.3, to=to)(log_s, targets, tokens)["policy_gradient"]
        expected = 0.5 + 0.5 * (torch.tensor([1.0, -1.0, 0.0]) * (teacher - base)).exp().clamp(0.7, 1.3)
        torch.testing.assert_close(found, expected)
    assert Evidence(wrong_only=True)(log_s, targets, tokens)["policy_gradient"][0] == 1
    entropy = -(log_t.exp() * log_t).sum(-1)
    assert Entropy(most=float(entropy[0]))(log_s, targets, tokens).tolist() == (entropy <= entropy[0]).double().tolist()
    torch.testing.assert_close(own_probability(log_s, targets, tokens)["cross_entropy"], own.exp())


def test_a_gate_by_term_multiplies_that_term_alone():
    log_s, log_t, _ = scores(4)
    tokens = Tokens(torch.arange(4), torch.arange(4), torch.ones(4), reward=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    gate = ByVerdict({"divergence": 0.0}, {"cross_entropy": 0.0, "divergence": 2.0})
    make = partial(Objective, completion_mask, token_mean, reverse_kl, FullVocabulary(), cross_entropy=CrossEntropy())
    loss, stats = make(gate=gate)(log_s, {"teacher": FullLogits(log_t)}, tokens)
    plain = make()(log_s, {"teacher": FullLogits(log_t)}, tokens)[1]
    right = tokens.reward == 1
    torch.testing.assert_close(loss, torch.where(right, plain["cross_entropy_loss"], 2 * plain["divergence_loss"]))
    assert stats["divergence_gate"].tolist() == [0, 2, 0, 2] and make(gate=gate).reads_verdicts


@pytest.mark.parametrize(("k", "of", "divergence"), product((1, 3, 5), ("student", "teacher"), (reverse_kl, forward_kl, jsd)))
def test_top_k_with_a_sampled_tail_is_unbiased(k, of, divergence):
    log_s, log_t, _ = scores(1)
    support = TopKSampledTail(k, of)
    leaf = log_s.clone().requires_grad_()
    exact = torch.autograd.grad(FullVocabulary()(divergence, leaf.log_softmax(-1), FullLogProbs(log_t), None).sum(), leaf)[0]
    total = torch.zeros_like(exact)
    for y in range(V):
        tokens = Tokens(torch.tensor([y]), torch.tensor([0]), torch.ones(1))
        loss = support(divergence, leaf.log_softmax(-1), FullLogProbs(log_t), tokens)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
        total += log_s[0, y].exp() * slope
        same = support(divergence, leaf.log_softmax(-1), FullLogProbs(log_s), tokens)
        assert torch.autograd.grad(same.sum(), leaf)[0].abs().max() < 1e-12  # S = T
    torch.testing.assert_close(total, exact)


def test_a_servers_top_k_suffices_for_a_sampled_tail():
    log_s, log_t, _ = scores(2)
    tokens = Tokens(torch.tensor([1, 3]), torch.arange(2), torch.ones(2))
    ids, values = log_t.topk(2).indices, log_t.topk(2).values
    sampled = log_t.gather(-1, tokens.ids[:, None]).squeeze(1)
    support = TopKSampledTail(2, "teacher")
    ours = support(reverse_kl, log_s, TopKLogProbs(ids, values, sampled), tokens)
    torch.testing.assert_close(ours, support(reverse_kl, log_s, FullLogProbs(log_t), tokens))
    assert support.requires == "topk" and support.needs_own_samples


@pytest.mark.parametrize(
    ("ratio", "costs", "passes"), [(1.5, True, True), (1.5, False, False), (0.5, True, False), (0.5, False, True)]
)
def test_the_sampled_estimate_clips_as_ppo_does(ratio, costs, passes):
    log_s = torch.log(torch.tensor([[0.5, 0.5]], dtype=torch.float64)).requires_grad_()
    log_t = torch.log(torch.tensor([[0.1, 0.9]] if costs else [[0.9, 0.1]], dtype=torch.float64))
    old = log_s.detach()[:, 0] - torch.tensor(ratio, dtype=torch.float64).log()
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1), old_logprob=old)
    loss = SampledToken(clip=0.2)(reverse_kl, log_s, FullLogProbs(log_t), tokens)
    (slope,) = torch.autograd.grad(loss.sum(), log_s)
    advantage = float(log_t[0, 0] - log_s.detach()[0, 0])
    leaf = log_s.detach().clone().requires_grad_()
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1), old_logprob=old, advantage=torch.tensor([advantage]))
    (ppo,) = torch.autograd.grad(PolicyGradient(group_relative, clip=0.2)(leaf, tokens)[0].sum(), leaf)
    torch.testing.assert_close(slope, ppo)
    assert bool(slope.abs().max() > 0) == passes


def test_the_cost_limit_is_a_floor_of_the_reward():
    log_s = torch.log(torch.tensor([[0.5, 0.5]])).requires_grad_()
    target = FullLogProbs(torch.log(torch.tensor([[1e-6, 1 - 1e-6]])))
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1))
    (slope,) = torch.autograd.grad(SampledToken(cost_limit=2.0)(reverse_kl, log_s, target, tokens).sum(), log_s)
    torch.testing.assert_close(slope[0, 0], torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"loss\.vocab_support\.cost_limit=0"):
        SampledToken(cost_limit=0)


@pytest.mark.parametrize("sampled", [False, True])
def test_returns_give_the_gradient_of_the_divergence_of_whole_completions(sampled):
    """Two steps of three tokens each, all nine completions: the expected estimate is d/dS of KL(S || T) over completions."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    first, then = draw(3).requires_grad_(), draw(3, 3).requires_grad_()
    log_t = [draw(3).log_softmax(-1), draw(3, 3).log_softmax(-1)]
    s = [first.log_softmax(-1), then.log_softmax(-1)]
    joint_s, joint_t = s[0][:, None] + s[1], log_t[0][:, None] + log_t[1]
    exact = torch.autograd.grad((joint_s.exp() * (joint_s - joint_t)).sum(), (first, then), retain_graph=True)
    support = SampledToken() if sampled else FullVocabulary()
    objective = Objective(completion_mask, token_mean, reverse_kl, support, returns=Returns())
    total = torch.zeros((), dtype=torch.float64)
    for a, b in product(range(3), repeat=2):
        logits = torch.stack([s[0], s[1][a]])
        target = {"teacher": FullLogits(torch.stack([log_t[0], log_t[1][a]]))}
        tokens = Tokens(torch.tensor([a, b]), torch.arange(2), torch.ones(2), torch.zeros(2, dtype=torch.long))
        _, seen = objective.observe(logits.detach(), target, tokens)
        tokens = objective.with_returns(Tokens(tokens.ids, tokens.position, tokens.weight, tokens.sample, seen=seen))
        total = total + joint_s[a, b].exp().detach() * objective(logits, target, tokens)[0].sum()
    for ours, whole in zip(torch.autograd.grad(total, (first, then)), exact, strict=True):
        torch.testing.assert_close(ours, whole)


def test_returns_discount_and_stay_within_completions():
    tokens = batch((3, 2), (0.0, 0.0), 1)
    cost = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert Returns(0.5)(cost, tokens).tolist() == [0.5 * 2 + 0.25 * 4, 2.0, 0, 8.0, 0]
    assert Returns(1.0, length_normalized=True)(cost, tokens).tolist() == [3.0, 4.0, 0, 16.0, 0]
    with pytest.raises(ValueError, match=r"loss\.returns\.discount=2"):
        Returns(2)
    with pytest.raises(ValueError, match="loss/returns with loss/vocab_support=sampled"):
        Objective(completion_mask, token_mean, forward_kl, SampledToken(), returns=Returns())


def test_schedules_are_functions_of_the_step():
    line, wave = Linear(0.0, 1.0, 10, begin=5), Cosine(2.0, 0.0, 4)
    assert [line(now) for now in (0, 5, 10, 15, 99)] == [0, 0, 0.5, 1, 1] and wave(2) == pytest.approx(1.0) and wave(9) == 0
    objective = Objective(completion_mask, token_mean, reverse_kl, FullVocabulary(), coefficients={"divergence": line})
    for now in (12, 3, 12):
        objective.set_step(now)
    assert objective.coefficients["divergence"] == pytest.approx(0.7) and objective.scheduled == {
        "divergence_coefficient": line(12)
    }
    with pytest.raises(ValueError, match="steps=0"):
        Linear(0, 1, 0)


def test_the_interpolated_target_moves_from_the_student_to_the_teacher():
    log_s, log_t, _ = scores(3)
    leaf = log_s.clone().requires_grad_()
    taid = Interpolated(forward_kl, Linear(0.0, 1.0, 4))
    assert taid(log_s, log_t).abs().max() < 1e-12
    taid.set_step(2)
    mixed = (0.5 * log_s + 0.5 * log_t).log_softmax(-1)
    (ours,) = torch.autograd.grad(taid(leaf.log_softmax(-1), log_t).sum(), leaf)
    torch.testing.assert_close(ours, log_s.exp() - mixed.exp())
    taid.set_step(4)
    torch.testing.assert_close(taid(log_s, log_t), forward_kl(log_s, log_t))
    with pytest.raises(ValueError, match=r"loss\.divergence\.share"):
        Interpolated(forward_kl, 1.5)


def test_beyond_the_teacher_the_minimum_is_the_extrapolated_distribution():
    """lambda = 1.5: T^1.5 / R^0.5, normalised, has no gradient."""
    _, log_t, log_r = scores(2)
    goal = (1.5 * log_t - 0.5 * log_r).log_softmax(-1).requires_grad_()
    make = partial(Objective, completion_mask, token_mean, vocab_support=FullVocabulary())
    objective = make(divergence=reverse_kl, reference=reverse_kl, coefficients={"divergence": 1.5, "reference": -0.5})
    tokens = Tokens(torch.zeros(2, dtype=torch.long), torch.arange(2), torch.ones(2))
    loss, _ = objective(goal, {"teacher": FullLogits(log_t), "reference": FullLogits(log_r)}, tokens)
    assert torch.autograd.grad(loss.sum(), goal)[0].abs().max() < 1e-12
    for bad in ({"divergence": forward_kl}, {"coefficients": {"divergence": 0.4, "reference": -0.5}}):
        with pytest.raises(ValueError, match=r"loss\.coefficients\.reference=-0\.5"):
            options = {"divergence": reverse_kl, "coefficients": {"divergence": 1.5, "reference": -0.5}} | bad
            make(reference=reverse_kl, **options)


def test_unlikelihood_pushes_down_until_its_clip():
    log_s = torch.log(torch.tensor([[0.4, 0.6]])).requires_grad_()
    for ratio, expected in ((1.0, [1.0, 0.0]), (0.5, [0.0, 0.0])):
        old = log_s.detach()[0, :1] - torch.log(torch.tensor(ratio))
        loss, _ = Unlikelihood()(log_s, Tokens(torch.tensor([0]), torch.tensor([0]), torch.ones(1), old_logprob=old))
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), log_s)[0][0], torch.tensor(expected))


def half_right(example, text):
    return Verdict(float(len(text) % 2))


def seeing(weight=completion_mask, support=None, **options) -> Objective:
    support = support or FullVocabulary()
    return Objective(weight, partial(constant, tokens=12), options.pop("divergence", reverse_kl), support, **options)


OBJECTIVES = {
    "prefix_gap": lambda: seeing(by_prefix_gap, SampledToken()),
    "ranked": lambda: seeing(ranked),
    "important": lambda: seeing(important),
    "perplexity": lambda: seeing(by_perplexity, cross_entropy=CrossEntropy(), gate=ByVerdict({"divergence": 0.0}, {})),
    "pass_rate": lambda: seeing(by_pass_rate),
    "evidence": lambda: seeing(policy_gradient=PolicyGradient(group_relative), gate=Evidence()),
    "confident": lambda: seeing(support=SampledToken(), gate=Confident()),
    "returns": lambda: seeing(returns=Returns(0.9)),
    "returns_sampled": lambda: seeing(support=SampledToken(), returns=Returns()),
    "sampled_tail": lambda: seeing(support=TopKSampledTail(4)),
    "clipped": lambda: seeing(support=SampledToken(cost_limit=1.0, clip=0.2)),
    "taid": lambda: seeing(divergence=Interpolated(forward_kl, 0.5)),
    "skew_returns": lambda: seeing(divergence=skew_reverse_kl, returns=Returns()),
}
FAST = ("perplexity", "returns", "important")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in OBJECTIVES])
def test_gradients_do_not_depend_on_the_micro_batch(tiny, other, name):
    gradients = []
    for budget in (None, 1):
        options = dict(rollout=Ragged(samples=3), verify=half_right, dtype="float64", max_tokens_per_microbatch=budget)
        gradients.append(step(tiny, OBJECTIVES[name](), teacher=External(other, dtype="float64"), **options)[1])
    whole, cut = gradients
    assert whole.norm() > 1e-3 and (cut - whole).norm() / whole.norm() < 1e-10


@pytest.mark.parametrize("name", ["prefix_gap", "important", "confident", "sampled_tail", "taid"])
@pytest.mark.slow
def test_a_teacher_equal_to_the_student_gives_no_gradient(tiny, name):
    _, gradient, _ = step(tiny, OBJECTIVES[name](), teacher=FrozenStart(), dtype="float64", verify=half_right)
    assert gradient.norm() < 1e-12
