"""The shared reading against the texts that two models write: random vocabularies, and every text of a few letters.

Both sides' distributions of the first token are made from distributions of texts, each of which a tokenizer writes in one way.
"""

import random
from itertools import product

import pytest
import torch
from test_shared_outcomes import bpe, pair

from opd_lightning.data.token_bytes import TokenBytes
from opd_lightning.losses.aligned_targets import CoarseLogits
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.outcomes import Outcomes
from opd_lightning.types import Tokens

TEXTS = ["".join(letters) for letters in product("abc", repeat=5)]


def some_bpe(seed: int, merges: int) -> TokenBytes:
    """A tokenizer with random merges."""
    draw, pieces, made = random.Random(seed), ["a", "b", "c"], []
    while len(made) < merges:
        a, b = draw.choice(pieces), draw.choice(pieces)
        if a + b not in pieces and len(a + b) <= 4:
            pieces.append(a + b)
            made.append((a, b))
    return bpe("abc", made)


def coarse(outcomes: Outcomes, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of outcomes from those of tokens [1, V] and [1, W]."""
    zeros = torch.zeros(1, dtype=torch.long)
    log_s, target, _, _ = CoarseLogits(t, outcomes).log_probs(1.0).compared(s, Tokens(zeros, zeros, zeros))
    return log_s, target.log_p


@pytest.mark.parametrize("seed", range(12))
def test_a_divergence_of_outcomes_is_at_most_that_of_the_texts(seed):
    """On texts of which both sides' first tokens are one outcome; most are such."""
    sides = [some_bpe(2 * seed, 4 + seed % 5), some_bpe(2 * seed + 1, 3 + seed % 7)]
    outcomes = pair(*sides)[0]
    first = [torch.tensor([ids[0] for ids in side.encoded_batch(TEXTS)]) for side in sides]
    one, two = (side.outcome[ids] for side, ids in zip((outcomes.student, outcomes.teacher), first, strict=True))
    assert (one < len(outcomes.student)).all() and (two < len(outcomes.teacher)).all()
    same = one == two
    assert same.float().mean() > 0.5
    torch.manual_seed(seed)
    p, q = (torch.randn(len(TEXTS), dtype=torch.float64).mul(2).masked_fill(~same, -torch.inf).softmax(0) for _ in range(2))

    def tokens(side: int, texts: torch.Tensor) -> torch.Tensor:
        size = len(sides[side].table)
        return torch.zeros(size, dtype=torch.float64).index_add(0, first[side], texts).log()[None]

    found = coarse(outcomes, tokens(0, p), tokens(1, q))
    torch.testing.assert_close(found[0].exp().sum(), torch.ones((), dtype=torch.float64))
    for divergence in (forward_kl, reverse_kl, jsd):
        value = divergence(*found).nan_to_num(0.0).sum()
        whole = divergence(p[same].log()[None], q[same].log()[None]).sum()
        assert -1e-12 <= value <= whole + 1e-12
    equal = coarse(outcomes, tokens(0, p), tokens(1, p))
    torch.testing.assert_close(equal[0].exp(), equal[1].exp())


@pytest.mark.parametrize("seed", range(3))
def test_equal_vocabularies_have_each_token_as_an_outcome(seed):
    sides = some_bpe(seed, 8), some_bpe(seed, 8)
    outcomes = pair(*sides)[0]
    s, t = (torch.randn(1, len(sides[0].table), dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = coarse(outcomes, s, t)
    texts = outcomes.student.first
    assert outcomes.teacher.first.equal(texts) and not len(outcomes.student.more) and not len(outcomes.teacher.more)
    for a, b in zip(found, (s, t), strict=True):
        torch.testing.assert_close(a, b[:, texts].log_softmax(-1))
