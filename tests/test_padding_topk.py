"""Ids in a teacher's top k that are no tokens of the student's: left out, their probability counts as that of the rest."""

from functools import partial

import pytest
import torch
from served import Served

from opd_lightning.losses.aligned_targets import CoarseTopK
from opd_lightning.losses.diagnostics import diagnose
from opd_lightning.losses.divergences import EntropyAware, forward_kl, jsd, reverse_kl, skew_reverse_kl, total_variation
from opd_lightning.losses.targets import TopKLogProbs
from opd_lightning.losses.vocab_support import TopK, TopKSampledTail
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers.alignment.match import SharedIds
from opd_lightning.teachers.alignment.scores import OnShared
from opd_lightning.teachers.remote import of_tokens
from opd_lightning.training.run import run
from opd_lightning.types import Tokens
from opd_lightning.utils.vocabulary import ValidIds

V, PADDING = 6, 9
DIVERGENCES = [forward_kl, reverse_kl, partial(jsd, beta=0.3), skew_reverse_kl, total_variation, EntropyAware(0.5)]


def student() -> torch.Tensor:
    return torch.randn(2, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1).requires_grad_()


def padded(*ids: int) -> TopKLogProbs:
    """Two rows with these most probable ids, of probability 0.4, 0.3 and 0.2."""
    logprobs = torch.tensor([[0.4, 0.3, 0.2]] * 2, dtype=torch.float64).log()[:, : len(ids)]
    return TopKLogProbs(*of_tokens(torch.tensor([ids] * 2), logprobs, ValidIds(V)), sampled=torch.full((2,), -1.0))


def tokens() -> Tokens:
    return Tokens(torch.tensor([2, 1]), torch.arange(2), torch.ones(2))


def test_padding_comes_last_and_names_no_token():
    ids, logprobs = of_tokens(torch.tensor([[7, 1, 9], [3, 1, 2]]), torch.tensor([[-1.0, -2.0, -3.0]] * 2), ValidIds(6, (0,)))
    assert ids[0, 0] == 1 and len(set(ids[0].tolist())) == 3 and bool(ValidIds(6, (0,)).contains(ids).all())
    assert logprobs.tolist() == [[-2.0, -torch.inf, -torch.inf], [-1.0, -2.0, -3.0]]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_is_that_over_the_named_tokens_and_the_rest(divergence):
    """Value, slope and metrics are those of a top k of the named tokens alone, with a tail and renormalised."""
    plain = TopKLogProbs(torch.tensor([[4, 2]] * 2), torch.tensor([[0.4, 0.2]] * 2, dtype=torch.float64).log(), torch.ones(2))
    for tail in (True, False):
        found, slopes = [], []
        for target, k in ((padded(4, PADDING, 2), 3), (plain, 2)):
            log_s = student()
            found.append(TopK(k, tail_bucket=tail)(divergence, log_s, target, tokens()))
            slopes.append(torch.autograd.grad(found[-1].sum(), log_s)[0])
        assert found[0].isfinite().all() and slopes[0].isfinite().all()
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(slopes[0], slopes[1])
    told = [diagnose(student(), {"teacher": target}) for target in (padded(4, PADDING, 2), plain)]
    masses = [TopK(k).describe(student(), target) for k, target in ((3, padded(4, PADDING, 2)), (2, plain))]
    for a, b in (told, masses):
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tail", [True, False])
def test_a_row_of_padding_alone_teaches_nothing(tail):
    log_s = student()
    loss = TopK(2, tail_bucket=tail)(reverse_kl, log_s, padded(PADDING, PADDING + 1), tokens())
    torch.testing.assert_close(loss, torch.zeros(2, dtype=torch.float64))
    assert torch.autograd.grad(loss.sum(), log_s)[0].isfinite().all()


def test_the_sampled_tail_covers_what_is_not_named():
    """The written token of the second row has an id that fills a place: it is not among the named ones."""
    target = padded(4, PADDING, 2)
    assert 1 not in target.ids[:, :2] and target.ids[0, 2] == 0
    written = Tokens(torch.tensor([2, 0]), torch.arange(2), torch.ones(2))
    loss = TopKSampledTail(3, "teacher")(reverse_kl, student(), target, written)
    plain = TopKLogProbs(target.ids[:, :2], target.logprobs[:, :2], target.sampled)
    torch.testing.assert_close(loss, TopKSampledTail(2, "teacher")(reverse_kl, student(), plain, written))


def test_a_teacher_with_another_tokenizer_names_no_filler_either():
    same = torch.arange(V)
    target = OnShared(SharedIds(same, same, ValidIds(V)), ValidIds(V))(padded(4, PADDING, 2), torch.ones(2, dtype=torch.bool))
    assert isinstance(target, CoarseTopK) and target.ids[0].tolist() == [4, 2, V]
    log_s, log_t, *_ = target.log_probs(1.0).compared(student(), tokens())
    assert reverse_kl(log_s, log_t.log_p).sum(-1).isfinite().all()


class Padded(Served):
    """A model whose most probable token is a row of padding at every other position."""

    def answer(self, path, payload):
        status, answer = super().answer(path, payload)
        for choice in answer.get("choices", []):
            for entries in choice["prompt_logprobs"][1::2]:
                entries.pop(list(entries)[-1])
                entries["99999"] = {"logprob": -0.5}
        return status, answer


@pytest.mark.slow
def test_a_served_teacher_that_names_padding_has_a_finite_reverse_kl(small, other):
    served = Padded(other)
    try:
        folder = run(small("method=opd_topk", "teacher=remote", f"teacher.servers.urls={served.url}", "evaluation=none"))
    finally:
        served.close()
    rows = [row for row in read_csv(folder / "metrics.csv") if "train/loss" in row]
    assert all(0 < row["train/reverse_kl_topk"] < 100 and 0 < row["train/loss"] < 100 for row in rows)
