"""What a run costs: FLOPs by formula against a counter, the same however the work is cut up; and budgets that end a run."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_lightning.evaluation import Estimate, GreedyAccuracy
from opd_lightning.generation.transformers import decode
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.flops import Sizes
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.run import run
from opd_lightning.types import SamplingParams


@pytest.fixture(scope="module")
def lm(tiny):
    # FlopCounterMode does not know the fused attention of CPUs.
    return Pretrained(tiny, attention="eager").model()


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_reading_and_its_gradient_cost_what_a_counter_counts(lm):
    sizes, rows, length = Sizes.of(lm), 3, 24
    ids = torch.randint(2, 20, (rows, length))
    out = []
    forward = counted(lambda: out.append(lm(input_ids=ids, use_cache=False).logits))
    assert sizes.read([length] * rows) + sizes.logits(rows * length) == pytest.approx(forward, rel=0.05)
    backward = counted(lambda: out[0].logsumexp(-1).sum().backward())
    assert sizes.backward([length] * rows, rows * length) == pytest.approx(backward, rel=0.05)


def test_writing_costs_what_a_counter_counts(lm):
    prompts, new = [[5, 6, 7, 8, 9, 10]] * 4, 12
    decode(lm, prompts, SamplingParams(1), eos=[10**6], pad=0)  # the first time, a probe reads with and without padding
    found = counted(lambda: decode(lm, prompts, SamplingParams(new), eos=[10**6], pad=0))
    assert Sizes.of(lm).write([(6, new)] * 4) == pytest.approx(found, rel=0.05)


def test_frozen_weights_have_no_gradient_to_pay_for(lm):
    sizes = Sizes.of(Student(lm).requires_grad_(False).lm)
    lm.requires_grad_(True)
    assert sizes.trained == sizes.trained_head == 0
    assert sizes.backward([10], 0) - sizes.read([10]) == 4 * sizes.attention * 100  # attention has two inputs to differentiate


METHODS = ("sft", "opd", "sdft", "seqkd", "grpo")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m == "sdft" else pytest.mark.slow) for m in METHODS])
def test_flops_do_not_depend_on_how_the_work_is_cut_up(small, method):
    ledgers = []
    for cut in ("max_tokens_per_microbatch=null", "max_tokens_per_microbatch=30"):
        folder = run(small(f"method={method}", cut, f"study.name={method}-{cut.partition('=')[2]}"))
        ledgers.append(json.loads((folder / "ledger.json").read_text())["flops"])
    assert ledgers[0] == ledgers[1] and (ledgers[0].get("forward", 0) > 0) == (method != "grpo")  # whose rewards are all 0 here
    assert (ledgers[0].get("teacher", 0) > 0) == (method in ("opd", "sdft"))
    assert (ledgers[0]["rollout"] > 0) == (method != "sft")


BUDGETS = {
    "sft": "flops",
    "opd": "flops",
    "sdft": "flops",
    "grpo": "flops",
    "opd_sampled": "student_tokens",
    "gkd": "student_tokens",
}


@pytest.mark.parametrize(("method", "budget"), BUDGETS.items())
def test_every_method_stops_within_one_batch_of_its_budget(small, method, budget):
    limit = {"flops": 3e7, "student_tokens": 150}[budget]
    folder = run(small(f"method={method}", f"budget.{budget}={limit}", "~trainer.max_steps", "evaluation=none"))
    rows = read_csv(folder / "metrics.csv")
    spent = [row[f"cost/{budget}"] for row in rows if f"cost/{budget}" in row]
    assert spent[-1] >= limit > spent[-2] and len(spent) > 2
    ledger, status = (json.loads((folder / f"{name}.json").read_text()) for name in ("ledger", "status"))
    assert status["ended_by"] == f"budget.{budget}"
    assert sum(ledger["flops"].values()) == rows[-1]["cost/flops"] > 0


def test_a_target_must_be_reached_twice_in_a_row_on_validation(small, monkeypatch):
    """The test split has no say; a run that never gets there ends at its last step and is censored."""
    told = iter([0.0, 0.9, 0.1, 0.9, 0.9, 0.9])
    real = GreedyAccuracy.__call__

    def scripted(self, student, teachers, generator):
        found = real(self, student, teachers, generator)
        return found if not self.prefix else found | {"validation/new/accuracy": Estimate(next(told))}

    monkeypatch.setattr(GreedyAccuracy, "__call__", scripted)
    cfg = small("method=sft", "evaluation=study", "evaluation.every=1", "budget.accuracy=0.8", "trainer.max_steps=9")
    status = json.loads((run(cfg) / "status.json").read_text())
    assert (status["step"], status["ended_by"]) == (4, "budget.accuracy")


def test_a_target_for_a_number_that_is_not_measured_is_refused(small):
    with pytest.raises(
        ValueError, match=r"budget\.metric=validation/new/accuracy is no number.*new/accuracy.*evaluation=study"
    ):
        run(small("budget.accuracy=0.9"))
    with pytest.raises(ValueError, match="never ends method=sft"):
        run(small("method=sft", "budget.student_tokens=100", "~trainer.max_steps"))
