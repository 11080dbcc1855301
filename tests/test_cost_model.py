"""The cost model: predicted seconds in closed form, beside the measured ones in the ledger and in the check."""

import json

import pytest
import torch

from opd_lightning.callbacks import predictions
from opd_lightning.check import examine
from opd_lightning.config import compose
from opd_lightning.models.cost_model import NUMBERS, Model, Rates, Work, off, predicted
from opd_lightning.models.flops import Sizes
from opd_lightning.training.run import run

MODEL = Model(Sizes(1000, 10, 200, 1000, 200), layers=3, trained=1200, width=4)
RATES = Rates(products=1e3, reading=1e2, layer=0.4)


def test_seconds_follow_from_the_rates():
    work = Work({"rollout": 9e3, "teacher": 2e3, "forward": 3e3, "backward": 6e3}, decoded=5, readings=2, passes=4)
    calls = 3 * 0.4
    found = predicted(work, RATES, MODEL)
    assert found["rollout"] == pytest.approx(5 * 1200 * 4 / 1e2 + 6 * calls)
    assert found["score"] == pytest.approx(2 + 2 * calls)
    assert found["update"] == pytest.approx(9 + 12 * calls + NUMBERS * 4 * 1200 / 1e2)
    many_rows = Work({"rollout": 9e6}, decoded=5)
    assert predicted(many_rows, RATES, MODEL)["rollout"] == pytest.approx(9e3 + 6 * calls)
    assert predicted(Work({}), RATES, MODEL)["rollout"] == 0


def test_parts_that_are_off_are_named():
    found = {"rollout": 10.0, "score": 1.0, "update": 4.0}
    assert off(found, {"rollout": 12.0, "score": 0.3, "update": 3.0}) == {}
    assert off(found, {"rollout": 12.0, "score": 1.0, "update": 8.0}) == {"update": 2.0}
    text = predictions.sentence(found, {"rollout": 5.0, "score": 1.0, "update": 8.0})
    assert "rollout 5 s (10), score 1 s (1), update 8 s (4)" in text
    assert text.endswith("rollout took 0.5 times the prediction, update took 2 times the prediction")
    assert predictions.sentence(found, found) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_measured(dtype):
    rates = Rates.measure(torch.device("cpu"), dtype)
    assert rates.products > 1e8 and rates.reading > 1e6 and 0 < rates.layer < 0.5


def test_a_run_writes_predictions_where_it_lasts_long_enough(monkeypatch, small, tmp_path):
    folder = run(small("trainer.max_steps=2"))
    assert "predicted_seconds" not in json.loads((folder / "ledger.json").read_text())
    monkeypatch.setattr(predictions, "WORTH_SAYING", 0.0)
    ledger = json.loads((run(small("trainer.max_steps=3", "seed=5")) / "ledger.json").read_text())
    assert set(ledger["predicted_seconds"]) == {"rollout", "score", "update"}
    assert all(0 < ledger["measured_seconds"][part] < ledger["seconds"][part] for part in ledger["predicted_seconds"])


def test_the_check_predicts_the_seconds_of_a_step():
    texts = {result.name: result.text for result in examine(compose(["method=sft", "logger=none"]), fast=True)}
    assert "a step takes about" in texts["seconds"] and "rollout" not in texts["seconds"]
