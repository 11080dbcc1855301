"""The check's advice: what each teacher and context would tell the student, in numbers and a sentence."""

import re
from dataclasses import replace

import pytest
import torch

from opd_lightning.check import advice, contexts_of, show_advice
from opd_lightning.preflight.advice import Advice, advantages_of, interval_of, sentence
from opd_lightning.rollout.base import single_turn
from opd_lightning.types import Completion, Rendered, Verdict


@pytest.mark.slow
def test_contexts_are_told_apart(small):
    """The shipped start model reads a result of its own task behind a solution, and a new rule changes its words."""
    words = ["method=sdft", "model=world", "context=demonstration"]
    cfg = small(*words, "~model.path", "~model.teacher", "context.template='{prompt} [ result {demonstration} ] ='")
    contexts = {name: node for name, node in contexts_of(words).items() if name in ("solution", "sibling", "feedback")}
    found = {row.candidate: row for row in advice(cfg, contexts)}
    assert set(found) == {"teacher", "context=solution", "context=sibling", "context=feedback"}
    solution = found["context=solution"]
    assert solution.accuracy == 1.0 > solution.student_accuracy and solution.shown == 1.0 and solution.changed > 0.1
    assert "is right more often than the student" in solution.sentence
    assert found["context=sibling"].shown < 1


@pytest.mark.slow
def test_a_teacher_like_the_student_and_a_random_one(small, capsys):
    rows = {}
    for teacher in (["teacher.path=${model.path}", "context=none", "method=grpo_opd"], ["method=opd"]):
        rows[teacher[-1]] = advice(small(*teacher), {})[0]
    assert rows["method=grpo_opd"].sentence == "this teacher leaves the distribution as it is."
    assert rows["method=opd"].reverse_kl > 0.1 and rows["method=opd"].alignment is None
    show_advice(list(rows.values()))
    assert "teacher: this teacher leaves the distribution as it is." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"reverse_kl": 1e-5, "changed": 0.0}, "this context leaves the distribution as it is."),
        ({"accuracy": 0.1, "student_accuracy": 0.2}, "the teacher is wrong more often than the student."),
        (
            {"accuracy": 0.3, "student_accuracy": 0.2, "alignment": 0.4, "interval": (0.1, 0.5)},
            "right more often .*goes where the verdicts do",
        ),
        ({"accuracy": 0.2, "student_accuracy": 0.2, "alignment": -0.4, "interval": (-0.5, -0.3)}, "as often .*points away"),
        ({"alignment": 0.4, "interval": (-0.1, 0.6)}, "was not judged; whether .* cannot be told from these prompts"),
        ({}, "the verdicts are all alike"),
    ],
)
def test_sentences(numbers, says):
    row = replace(Advice("context=solution", "", 1.0, reverse_kl=0.5, changed=0.2), **numbers)
    assert re.search(says, sentence(row))


def test_verdicts_are_compared_within_prompts_if_these_differ():
    def rows(rewards):
        made = [single_turn(None, b // 4, Rendered([5]), Completion([1], "stop"), "student", False) for b in range(8)]
        return [replace(sample, verdict=Verdict(reward)) for sample, reward in zip(made, rewards, strict=True)]

    torch.testing.assert_close(
        advantages_of(rows([1.0, 0, 0, 0, 1, 1, 1, 1])), torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0])
    )
    assert advantages_of(rows([1.0] * 4 + [0.0] * 4))[0] > 0 and advantages_of(rows([1.0] * 8)) is None
    assert advantages_of([replace(sample, verdict=None) for sample in rows([0.0] * 8)]) is None


@pytest.mark.slow
@pytest.mark.parametrize("alignment", ["shared", "spans", "uld"])
def test_a_teacher_with_another_tokenizer_is_asked(small, paths, alignment):
    """In tokens of its own; its KL is over the outcomes of both, or that of ranks, which is none."""
    loss = {"spans": ["loss/vocab_support=sampled"], "uld": ["loss/divergence=total_variation"]}.get(alignment, [])
    cfg = small("method=opd", f"teacher.path={paths['byte_bpe']}", f"teacher.alignment={alignment}", *loss)
    row = advice(cfg, {})[0]
    assert row.shown == 1.0 and row.accuracy is not None and row.student_accuracy is not None
    assert (row.reverse_kl is None) == (alignment == "uld") and (row.forward_kl is None) == (alignment != "shared")


def test_the_interval_of_a_cosine_is_of_resampled_prompts():
    torch.manual_seed(0)
    groups = torch.arange(20).repeat_interleave(3)
    one = torch.randn(60, 4, dtype=torch.float64)
    found, (low, high) = interval_of(one, one + 0.5 * torch.randn_like(one), groups)
    assert found == pytest.approx(torch.cosine_similarity(one.flatten(), one.flatten(), dim=0).item(), abs=0.2)
    assert 0 < low < found < high <= 1
    found, (low, high) = interval_of(one, torch.randn_like(one), groups)
    assert low < 0 < high and low < found < high
    assert interval_of(one, one * (groups < 2)[:, None], groups)[1] == (-1.0, 1.0)
