"""Prompts are a pure function of (seed, position); sequences are joined without gaps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.data.batching import collate, pack, packed_index, plan_micro_batches
from opd_lightning.data.prompts import PromptStream
from opd_lightning.rollout.base import single_turn
from opd_lightning.types import Completion, Example, Rendered
from opd_lightning.utils.seeds import derive_seed


def take(stream: PromptStream, batches: int) -> list[list[int]]:
    return [batch for batch, _ in zip(stream, range(batches), strict=False)]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 9), st.integers(0, 20))
def test_a_resumed_stream_goes_on_where_it_stopped(n, batch, seed, start):
    whole = take(PromptStream(n, batch, seed), start + 3)
    assert take(PromptStream(n, batch, seed, start=start), 3) == whole[start:]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 9))
def test_ranks_share_the_batches_of_one_device(n, per_rank, seed):
    one = take(PromptStream(n, 2 * per_rank, seed), 5)
    ranks = [take(PromptStream(n, 2 * per_rank, seed, rank=r, world_size=2), 5) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in one]


@given(st.integers(1, 40), st.integers(0, 9))
def test_every_epoch_visits_every_example_once(n, seed):
    stream = PromptStream(n, 1, seed)
    for epoch in range(3):
        assert sorted(stream.index(epoch * n + i) for i in range(n)) == list(range(n))


def test_seeds_depend_on_every_part():
    seeds = {derive_seed(0, "rollout", step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200 and derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize(("n", "batch", "world", "words"), [(0, 4, 1, "no training examples"), (8, 3, 2, "data.batch_size=3")])
def test_bad_streams_are_refused(n, batch, world, words):
    with pytest.raises(ValueError, match=words):
        PromptStream(n, batch, 0, world_size=world)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.one_of(st.none(), st.integers(1, 200)))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    plan = plan_micro_batches(lengths, budget)
    assert sorted(b for rows in plan for b in rows) == list(range(len(lengths)))
    for rows in plan:
        assert budget is None or len(rows) == 1 or len(rows) * max(lengths[b] for b in rows) <= budget


rows_of_ids = st.lists(
    st.tuples(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.lists(st.integers(2, 9), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)


@given(rows_of_ids)
def test_joined_hidden_states_predict_the_completion_tokens(rows):
    """The token after each picked position is the completion token, in row order, and nothing else is picked.

    Whether the samples' own prompts are read or others in their place, as by a teacher.
    """
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    example, cpu = Example("e", []), torch.device("cpu")
    own, others = (
        [
            single_turn(example, i, Rendered(p), Completion(c, "stop"), "student", False)
            for i, (p, c) in enumerate(zip(some, completions, strict=True))
        ]
        for some in (prompts, [[2] * (1 + len(p) % 4) for p in prompts])
    )
    for sequences in (collate(own, 0, cpu), collate(others, 0, cpu, prompts)):
        assert [row[: len(p)].tolist() for row, p in zip(sequences.input_ids, prompts, strict=True)] == prompts
        followed = sequences.input_ids[sequences.row, sequences.column + 1]
        assert followed.tolist() == [t for c in completions for t in c] == pack(own, cpu).ids.tolist()
        assert sequences.attention_mask.sum(1).tolist() == [len(p) + len(c) for p, c in rows]
        order = list(reversed(range(len(rows))))
        packed = packed_index(order, [sample.trainable for sample in own])
        assert followed[packed].tolist() == [t for c in reversed(completions) for t in c]


def test_log_probabilities_and_weights_are_not_rounded_under_a_narrow_default():
    """As Lightning sets it within a step of bf16-true."""
    example, prompt = Example("a", [{"role": "user", "content": "x"}]), Rendered([1, 2])
    torch.set_default_dtype(torch.bfloat16)
    try:
        sample = single_turn(example, 0, prompt, Completion([3, 4], "stop", [-0.123456, -2.0]), "student", False)
        tokens = pack([sample], torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert tokens.sampler_logprob.tolist() == pytest.approx([-0.123456, -2.0]) and tokens.weight.dtype == torch.float32
