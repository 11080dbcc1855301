"""Scores on disk: each sample finds the reading that is its own, and what does not fit is said to be what it is."""

from dataclasses import replace

import pytest
import torch

from opd_lightning.data.score_files import Index, ScoreFiles, pack_samples, save_shard, shard_path
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.types import Example, Sample


def sample(name: str, *ids: int, group: int = 0, question: str = "?") -> Sample:
    """A sample of one prompt token and a completion."""
    tokens = torch.tensor([7, *ids])
    chat = [{"role": "user", "content": question}]
    return Sample(Example(name, chat), group, tokens, torch.arange(len(tokens)) > 0, 1, "student", "stop")


def files(folder, samples, scores, n=1) -> ScoreFiles:
    """A folder of samples, all of whose tokens have the sample's score."""
    tensors = {"sampled": torch.cat([torch.full((s.trainable,), score) for s, score in zip(samples, scores, strict=True)])}
    save_shard(shard_path(folder, 0), pack_samples(samples) | tensors, [s.example.id for s in samples])
    shards = [{"samples": len(samples), "tokens": 0}]
    Index("topk", 1, 9, [], "", None, {}, n, "student", shards=shards, complete=True).write(folder)
    return ScoreFiles(folder)


def scores_of(found: ScoreFiles, samples) -> list[float]:
    return [float(found.rows("sampled", place)[0]) for place in found.find(samples)]


def test_equal_tokens_of_two_examples_have_their_own_scores(tmp_path):
    """Two rows with the same prompt and completion, and another demonstration each."""
    kept = [sample("a", 1, 2), sample("b", 1, 2)]
    found = files(tmp_path, kept, [-1.0, -2.0])
    assert scores_of(found, kept) == [-1.0, -2.0] and scores_of(found, kept[::-1]) == [-2.0, -1.0]
    with pytest.raises(ValueError, match="has several scores of a completion of example c"):
        found.find([sample("c", 1, 2)])


def test_equal_completions_beside_other_siblings_have_their_own_scores(tmp_path):
    """Two passes: a completion that both have was read behind another sibling in each."""
    first, second = [sample("a", 1), sample("a", 2)], [sample("a", 3), sample("a", 1)]
    found = files(tmp_path, [*first, *second], [-1.0, -2.0, -3.0, -4.0], n=2)
    assert scores_of(found, second) == [-3.0, -4.0] and scores_of(found, first) == [-1.0, -2.0]
    with pytest.raises(ValueError, match="take rollout=recorded"):
        found.find([sample("a", 1)])
    assert scores_of(found, [sample("a", 3)]) == [-3.0] and found.find([sample("a", 4)]) == [None]


def test_equal_scores_of_one_completion_are_no_question(tmp_path):
    assert scores_of(files(tmp_path, [sample("a", 1), sample("a", 1)], [-1.0, -1.001]), [sample("b", 1)]) == [-1.0]


@pytest.mark.parametrize(
    ("asked", "prompt", "sentence"),
    [
        (sample("z", 1), [7], "example z is not in it"),
        (sample("a", 1, question="!"), [7, 7], "the data have changed: the task has another prompt for example a"),
        (sample("a", 1), [7, 7], "the chat template, its options or the date"),
        (sample("a", 1), [7], "the completion of example a is another than the recorded one"),
    ],
)
def test_what_has_changed_is_named(tmp_path, asked, prompt, sentence):
    assert sentence in files(tmp_path, [sample("a", 1)], [-1.0]).why_other(asked.example, prompt)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 2}, "k=2, and 1 when it was begun"),
        ({"settings": {"trainer": {"precision": "bf16-true"}}, "k": 3}, "k=3, and 1 when it was begun, and 1 more"),
        ({"data": "y"}, "the training examples differ"),
        ({"template": "y"}, "the chat templates differ"),
        ({"complete": True, "shards": [{}]}, None),
    ],
)
def test_the_difference_of_two_indices_is_named(change, sentence):
    settings = {"trainer": {"precision": "32-true"}}
    begun = Index("topk", 1, 9, [], "", None, settings, 1, "student", data="x", template="x", compared="tokens")
    assert replace(begun, compared="").difference(begun) == "an earlier version of this package began it"
    found = begun.difference(replace(begun, **change))
    assert found is None if sentence is None else sentence in found
    assert "an earlier version" in replace(begun, data="").difference(begun)


def top_k(folder, samples, scores, compared, **more) -> ScoreFiles:
    """A folder of top-k scores, one number for all tokens of each sample."""
    rows = torch.cat([torch.full((s.trainable, 2), score) for s, score in zip(samples, scores, strict=True)])
    tensors = {"top_ids": torch.zeros_like(rows, dtype=torch.int32), "top_logprobs": rows, **more}
    save_shard(shard_path(folder, 0), pack_samples(samples) | tensors, [s.example.id for s in samples])
    shards = [{"samples": len(samples), "tokens": 0}]
    Index("topk", 2, 9, [], "", None, {}, 1, "student", compared=compared, shards=shards, complete=True).write(folder)
    return ScoreFiles(folder)


def test_scores_of_outcomes_are_known_again_by_what_is_most_probable(tmp_path):
    """They have no scores of the written tokens."""
    table = {"table.outcome": torch.zeros(9, dtype=torch.int32), "table.shared": torch.zeros(1, dtype=torch.int32)}
    found = top_k(tmp_path, [sample("a", 1), sample("b", 1)], [-1.0, -torch.inf], "outcomes", **table)
    assert found.first_numbers().tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match="has several scores of a completion of example c"):
        found.find([sample("c", 1)])


@pytest.mark.parametrize(
    ("compared", "marked", "refused"),
    [("", True, True), ("", False, False), ("tokens", True, False), ("outcomes", False, True)],
)
def test_scores_that_may_be_of_outcomes_and_do_not_say_which_are_refused(tmp_path, compared, marked, refused):
    """An earlier version wrote the scores of a teacher with another tokenizer like any top k, and which tokens have some."""
    more = {"sampled": torch.zeros(2)} | ({"valid": torch.tensor([True, False])} if marked else {})
    top_k(tmp_path, [sample("a", 1, 2)], [-1.0], compared, **more)
    if not refused:
        assert not CachedTeacher(str(tmp_path)).apart
        return
    with pytest.raises(ValueError, match=r"no table of outcomes.*Score it again"):
        CachedTeacher(str(tmp_path))
