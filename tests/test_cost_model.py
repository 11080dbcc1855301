"""The cost model: predicted seconds in closed form, beside the measured ones in the ledger and in the check."""

import json

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig

from opd_lightning.callbacks import predictions
from opd_lightning.check import examine
from opd_lightning.config import compose
from opd_lightning.models.cost_model import NUMBERS, Model, Rates, Work, layers_of, off, predicted
from opd_lightning.models.flops import Sizes
from opd_lightning.training.run import run

MODEL = Model(Sizes(1000, 10, 200, 1000, 200), trained=1200, width=4)
RATES = Rates(forward=1e3, backward=5e2, logits=2e3, decode=2e2, reading=1e2)


def test_seconds_follow_from_the_rates():
    flops = {"rollout": 9e3, "teacher": 2e3, "forward": 3e3, "backward": 6e3}
    found = predicted(Work(flops, decoded=5, positions=2, teacher_logits=800), RATES, MODEL)
    assert found["rollout"] == pytest.approx(5 * 4 * (1000 / 2e2 + 200 / 1e2))
    assert found["score"] == pytest.approx(1.2)
    assert found["update"] == pytest.approx(2.2 + (6e3 - 1600) / 5e2 + (3 * 800 + 800) / 2e3 + NUMBERS * 4 * 1200 / 1e2)
    assert predicted(Work({"rollout": 9e6}, decoded=5), RATES, MODEL)["rollout"] == pytest.approx(9e3)
    assert set(predicted(Work({}), RATES, MODEL).values()) == {0}


def test_parts_that_are_off_are_named():
    found = {"rollout": 10.0, "score": 1.0, "update": 4.0}
    assert off(found, {"rollout": 12.0, "score": 0.3, "update": 3.0}) == {}
    assert off(found, {"rollout": 12.0, "score": 1.0, "update": 8.0}) == {"update": 2.0}
    text = predictions.sentence(found, {"rollout": 5.0, "score": 1.0, "update": 8.0})
    assert "rollout 5 s (10), score 1 s (1), update 8 s (4)" in text
    assert text.endswith("rollout took 0.5 times the prediction, update took 2 times the prediction")
    assert predictions.sentence(found, found) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config, MambaConfig])
def test_rates_are_measured(dtype, kind):
    sizes = (
        {"num_attention_heads": 6, "intermediate_size": 96}
        if kind is LlamaConfig
        else {"n_head": 6}
        if kind is GPT2Config
        else {}
    )
    rates = Rates.measure(torch.device("cpu"), dtype, kind(hidden_size=48, vocab_size=64, **sizes))
    assert min(rates.forward, rates.backward, rates.logits, rates.decode) > 1e6


def test_a_wide_model_is_measured_by_a_smaller_one_of_its_proportions():
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8)
    small = layers_of(config, torch.device("meta"), torch.bfloat16).config
    assert (small.hidden_size, small.intermediate_size, small.num_hidden_layers) == (2048, 7168, 2)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (16, 2, 128)


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
