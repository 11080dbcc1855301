"""Several readings: contrasts, routed teachers by name, mixtures of writers, shuffled targets, interleaved sampling."""

import math

import pytest
import torch

from opd_lightning.config import compose
from opd_lightning.config.compatibility import check
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.rollout import SpeculativeRollout
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers import BaseTeacher, MixedTeacher, ShuffledTeacher, TopKTeacher, external
from opd_lightning.teachers.contexts import Sibling
from opd_lightning.teachers.mixed import MixedScores
from opd_lightning.training.run import run
from opd_lightning.types import Attempt, Completion, Example, Prompts, Rendered, SamplingParams, Verdict
from tests.test_contracts import renderer, samples, student  # noqa: F401

V = 6


class Fixed(BaseTeacher):
    """Log-probabilities that are the same everywhere, or given."""

    def __init__(self, log_p, provides=("full", "topk", "sampled")):
        super().__init__()
        self.log_p, self.provides = log_p, frozenset(provides)

    def score(self, samples, max_tokens=None):
        n = sum(sample.trainable for sample in samples)
        rows = self.log_p.expand(n, -1) if self.log_p.dim() == 1 else self.log_p[:n]
        return HiddenScores(rows, lambda hidden, out=None: hidden.clone(), rows.shape[1])


def test_a_wrong_sibling_is_shown_on_request():
    example = Example("a", [{"role": "user", "content": "1+1"}])
    own, right, wrong = (Attempt(text, Verdict(score)) for text, score in (("own", 0.0), ("two", 1.0), ("three", 0.0)))
    shown = [Sibling("{prompt} {sibling}", wrong=w)(example, own, [right, wrong])[-1]["content"] for w in (False, True)]
    assert shown == ["1+1 two", "1+1 three"] and Sibling("{prompt} {sibling}", wrong=True)(example, own, [right]) is None


def test_a_negative_weight_contrasts_two_readings():
    """Good^1.5 / bad^0.5, normalised; a token that one of them lacks stays without probability."""
    good, bad = torch.tensor([0.5, 0.3, 0.2, 0.0]).log(), torch.tensor([0.1, 0.3, 0.3, 0.3]).log()
    ids = torch.zeros(1, dtype=torch.long)
    parts = [HiddenScores(x[None], lambda hidden, out=None: hidden.clone(), 4) for x in (good, bad)]
    for pair, weights in ((parts, [1.5, -0.5]), (parts[::-1], [-0.5, 1.5])):
        target = MixedScores(pair, weights, "log", ids).chunk(slice(0, 1)).log_probs(1.0).log_p[0]
        torch.testing.assert_close(
            target, (1.5 * good - 0.5 * bad.nan_to_num()).masked_fill(good == -math.inf, -math.inf).log_softmax(-1)
        )
    flipped = MixedScores(parts[::-1], [1.5, -0.5], "log", ids).chunk(slice(0, 1)).log_probs(1.0).log_p[0]
    assert flipped[3] == -math.inf and not flipped.isnan().any()
    teachers = {"a": Fixed(good), "b": Fixed(bad)}
    assert MixedTeacher(teachers, {"a": 3.0, "b": -1.0}, "log").weights == {"a": 1.5, "b": -0.5}
    for weights, space in (({"a": 3.0, "b": -1.0}, "probability"), ({"a": 1.0, "b": -1.0}, "log")):
        with pytest.raises(ValueError, match=r"teacher\.weights="):
            MixedTeacher(teachers, weights, space)


@pytest.mark.slow
def test_routed_teachers_are_logged_by_name(small):
    folder = run(small("method=opd", "teacher=routed", "teacher.teachers.prior.path=${model.path}", "evaluation=none"))
    row = read_csv(folder / "metrics.csv")[-1]
    shares = [row[f"rollout/teacher_share/{name}"] for name in ("new", "prior")]
    assert sum(shares) == pytest.approx(1.0)
    kls = [row.get(f"teacher/{name}/reverse_kl") for name in ("new", "prior")]
    assert kls[1] is None or abs(kls[1]) < 1e-5  # the start model is the student
    assert shares[0] == 0 or kls[0] is not None


@pytest.mark.slow
def test_a_sampled_divergence_on_a_mixture_is_of_the_students_tokens(small):
    words = ["method=opd_sampled", "rollout=mixture", "evaluation=none"]
    assert any("learns from the student's completions alone" in w for w in check(compose(words[:2])))
    nothing = run(small(*words, "rollout.share=0"))
    assert [row["train/skipped"] for row in read_csv(nothing / "metrics.csv")[1:]] == [1.0, 1.0]
    both = run(small(*words, "rollout.share=0", "loss/cross_entropy=nll", "loss/gate=by_source"))
    row = read_csv(both / "metrics.csv")[-1]
    assert row["train/divergence_gate"] == 0.0 and row["train/cross_entropy_gate"] == 1.0 and row["train/skipped"] == 0.0


def test_a_shuffled_teacher_moves_every_target_within_its_completion(student, renderer):  # noqa: F811
    some = samples(renderer)
    counts = [sample.trainable for sample in some]
    rows = torch.arange(sum(counts)).float()[:, None].expand(-1, V)
    teacher = ShuffledTeacher(Fixed(rows), seed=1)
    teacher.setup(student, renderer)
    found = teacher.score(some).hidden[:, 0]
    at = 0
    for n in counts:
        own = rows[at : at + n, 0]
        assert sorted(found[at : at + n].tolist()) == own.tolist() and (n == 1 or (found[at : at + n] != own).all())
        at += n
    assert torch.equal(found, teacher.score(some).hidden[:, 0])
    with pytest.raises(ValueError, match="which cannot move"):
        ShuffledTeacher(Fixed(rows, ("sampled",)))
    assert ShuffledTeacher(TopKTeacher(external("x"), 2)).provides == {"topk"}


class Counting:
    """A student that writes 0, 1, 2, ... from where a prompt ends, and ends with 5."""

    def generate(self, prompts, sampling, seed, model=None):
        done = []
        for prompt in prompts:
            start = len(prompt.token_ids) - 1
            ids = list(range(start, V))[: sampling.max_new_tokens]
            done.append(Completion(ids, "stop" if ids[-1] == 5 else "length"))
        return done


class Plain:
    """A renderer."""

    valid_ids, end_ids = None, (5,)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_a_speculative_rollout_replaces_what_the_teacher_would_not_write(block):
    """The teacher knows 0, 1 and 4 only; where the student writes 2 or 3, it writes 4, whatever the block."""
    prompts = Prompts([Example("a", []), Example("b", [])], [Rendered([0]), Rendered([0])])
    log_p = torch.tensor([0.0, 0.0, -1e4, -1e4, 1e4, -1e4])
    rollout = SpeculativeRollout(Plain(), SamplingParams(6), accept=3, block=block)
    result = rollout(prompts, 0, Counting(), {"teacher": Fixed(log_p)})
    assert [sample.completion_ids for sample in result.samples] == [[0, 1, 4, 4, 4, 4]] * 2
    free = SamplingParams(9)
    all_own = SpeculativeRollout(Plain(), free, accept=V, block=block)(prompts, 0, Counting(), {"teacher": Fixed(log_p)})
    assert [(s.completion_ids, s.finish_reason) for s in all_own.samples] == [([0, 1, 2, 3, 4, 5], "stop")] * 2
    with pytest.raises(ValueError, match=r"rollout\.accept=-1"):
        SpeculativeRollout(Plain(), free, accept=-1)


@pytest.mark.slow
def test_schedules_and_returns_resume_with_equal_bits(small):
    falling = "{_target_: opd_lightning.losses.schedules.Linear, start: 1.0, end: 0.0, steps: 8}"
    words = ["method=grpo_opd", f"loss.coefficients.divergence={falling}", "loss/returns=discounted", "loss/weight=important"]
    words += ["evaluation=none", "rollout.sampling.max_new_tokens=6"]
    folder = run(small(*words, "study.name=parts", "trainer.max_steps=3"))
    assert run(small(*words, "study.name=parts", "trainer.max_steps=5")) == folder
    whole = run(small(*words, "study.name=whole", "trainer.max_steps=5"))
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)
    shares = [row["train/divergence_coefficient"] for row in read_csv(whole / "metrics.csv")[1:]]
    assert shares == pytest.approx([1 - step / 8 for step in range(5)])


@pytest.mark.slow
def test_the_drawn_path_of_a_speculative_rollout_trains_and_counts_the_teachers_reading(small):
    folder = run(small("method=opd", "rollout=speculative", "rollout.accept=4", "rollout.block=3", "evaluation=none"))
    row = read_csv(folder / "metrics.csv")[-1]
    assert row["cost/teacher_tokens"] > 0 and row["cost/student_tokens"] == 0
