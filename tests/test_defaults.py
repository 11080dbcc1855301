"""Defaults for real models: micro-batches by free memory, likelihood without a verifier, alpha by r, and the terminal."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import Logger

from opd_lightning.callbacks import Progress
from opd_lightning.config.compatibility import check
from opd_lightning.evaluation import leading
from opd_lightning.evaluation.divergence import ReferenceLikelihood
from opd_lightning.preflight import resources
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.token_budget import KEY
from opd_lightning.preflight.token_budget import chosen as chosen_tokens
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.runs.status import read_status
from opd_lightning.training import run as module
from opd_lightning.training.run import run


def weights(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def memory(monkeypatch):
    """Sets the free memory, in bytes."""
    return lambda free: monkeypatch.setattr(resources, "free_memory", lambda cfg: ("machine", free))


@pytest.mark.slow
def test_little_memory_cuts_the_batch_and_a_resumed_run_keeps_the_number(small, memory, monkeypatch, caplog):
    """Chosen once, said, recorded, and reused with other memory."""
    monkeypatch.setattr(resources, "LEAST", 16)
    given = ("method=sft", "evaluation=none", "data.batch_size=8")
    memory(10**6)
    caplog.set_level("INFO")
    folder = run(small(*given, "trainer.max_steps=1"))
    chosen = read_status(folder)[KEY]
    assert 16 <= chosen < 128 and f"at most {chosen} padded tokens" in caplog.text
    assert f"{KEY}: {chosen}\n" in (folder / "config.yaml").read_text()
    memory(10**12)
    assert read_status(run(small(*given, "trainer.max_steps=2")))[KEY] == chosen


@pytest.mark.slow
def test_weights_do_not_depend_on_the_number(small, memory, monkeypatch):
    """To rounding where the batch is cut; bit for bit where it is whole. A run from before goes on with the whole batch."""
    monkeypatch.setattr(resources, "LEAST", 16)
    given, found = ("method=grpo", "evaluation=none"), []
    for name, free in (("whole", 10**12), ("enough", 10**9), ("cut", 10**6)):
        memory(free)
        found.append(weights(run(small(*given, f"study.name={name}"))))
    plain = run(small(*given, "study.name=plain", f"{KEY}=null"))
    assert all(torch.equal(tree[name], value) for tree in found[:2] for name, value in weights(plain).items())
    assert all(torch.allclose(found[2][name], value, atol=2e-6) for name, value in weights(plain).items())
    assert read_status(run(small(*given, "study.name=plain", "trainer.max_steps=3")))[KEY] is None


def test_the_number_is_a_power_of_two_that_grows_with_memory(small, memory):
    cfg = small("method=grpo")
    parts, found = assemble(cfg, None), []
    for free in (10**7, 10**9, 10**10, 10**12):
        memory(free)
        found.append(resources.automatic_tokens(parts, cfg)[0])
    assert (
        found == sorted(found) and found[0] < found[1] and found[-1] == resources.MOST and all(n & (n - 1) == 0 for n in found)
    )


def test_a_model_of_unknown_sizes_takes_the_whole_batch(monkeypatch):
    monkeypatch.setattr("opd_lightning.preflight.token_budget.automatic_tokens", lambda *_: 1 / 0)
    assert chosen_tokens(None, None) is None


@pytest.mark.parametrize("value", ["0", "some"])
def test_another_word_than_auto_is_refused(small, value):
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch=.*at least 1, or auto, or null"):
        check(small(f"{KEY}={value}"))


def test_alpha_follows_r_unless_set(small):
    read = [small("adapter=lora", *more).adapter for more in ((), ("adapter.r=8",), ("adapter.r=8", "adapter.lora_alpha=5"))]
    assert [(a.r, a.lora_alpha) for a in read] == [(32, 64), (8, 16), (8, 5)]


@pytest.fixture
def rows(tmp_path) -> str:
    """A file of prompts with references that the tiny model's tokenizer has words for."""
    digits = [[(7 * i + k * k) % 10 for k in range(5)] for i in range(60)]
    lines = [
        {"prompt": f"rotate {' '.join(map(str, d))}", "completion": f"result {' , '.join(map(str, d[1:]))}"} for d in digits
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.slow
def test_sft_without_a_verifier_logs_the_likelihood_of_held_out_references(small, rows, capsys):
    """Per token, as `ReferenceLikelihood` measures it; said in the terminal when it is made."""
    task = ("task=table", f"task.path={rows}", "task.columns.completion=completion", "~task.n_train", "task.n_eval=4")
    cfg = small("method=sft", *task, "optim.lr=1e-2", "trainer.max_steps=4", "evaluation.every=2")
    node = {"_target_": f"{ReferenceLikelihood.__module__}.ReferenceLikelihood", "split": "test"}
    cfg.evaluation.suite = {**cfg.evaluation.suite, "likelihood": node}
    folder = run(cfg)
    record = json.loads((folder / "evaluation.json").read_text())
    for when in ("start", "end"):
        assert record[when]["new/nll"] == pytest.approx(-record[when]["heldout/log_likelihood"], rel=1e-5)
    assert record["end"]["new/nll"] < record["start"]["new/nll"]
    logged = [row["eval/new/nll"] for row in read_csv(folder / "metrics.csv") if "eval/new/nll" in row]
    assert len(logged) == 3
    told = capsys.readouterr().out
    assert all(f"step {step}, evaluation: new/nll" in told for step in (0, 2, 4))


def test_a_line_has_the_few_numbers_that_say_most():
    numbers = [
        "step",
        "new/length",
        "robust/none",
        "teacher/shown/accuracy",
        "prior/sort/accuracy",
        "new/accuracy",
        "prior/accuracy",
    ]
    assert leading(numbers) == ["new/accuracy", "prior/accuracy"]
    assert leading(["step", "validation/new/accuracy", "validation/new/length"]) == ["validation/new/accuracy"]
    assert leading(["step", "new/length"]) == ["new/length"] and leading(["step"]) == []


def test_a_skipped_step_shows_no_loss():
    """That of the last update with a gradient must not stand there."""
    bar = Progress()
    bar.begun, bar.first = 0.0, 0

    module = SimpleNamespace(ledger=SimpleNamespace(tokens={"completion_tokens": 10}))
    assert "loss 0.5" in bar.note(module, {"train/loss": 0.5, "train/skipped": 0.0})
    told = bar.note(module, {"train/skipped": 1.0, "rollout/reward": 0.0})
    assert "loss" not in told and told.startswith("no gradient, skipped  reward 0")


class Tables(Logger):
    """A logger that keeps tables."""

    name = version = "tables"

    def __init__(self):
        super().__init__()
        self.tables: dict[str, tuple[list[str], list[list]]] = {}

    def log_table(self, key, columns, data, step):
        """Keep the table."""
        self.tables[key] = columns, data

    def log_metrics(self, metrics, step=None):
        """Nothing."""

    def log_hyperparams(self, params):
        """Nothing."""


def test_rewards_verdicts_and_answers_are_kept_where_the_loss_reads_none(small, monkeypatch):
    """In samples.jsonl, outcomes.json and the tables of loggers that take them; no likelihood beside a verifier's accuracy."""
    made, taken = module.loggers, Tables()
    monkeypatch.setattr(module, "loggers", lambda cfg, folder: [*made(cfg, folder), taken])
    folder = run(small("method=sft", "trainer.max_steps=1", "callbacks.samples.every=1"))
    assert not any("nll" in name for name in json.loads((folder / "evaluation.json").read_text())["end"])
    outcome = next(iter(json.loads((folder / "outcomes.json").read_text())["accuracy"].values()))
    assert set(outcome) == {"skill", "content", "answer"} and isinstance(outcome["answer"], str)
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert sample["reward"] == 1.0 and sample["verdict"].startswith("right")
    assert set(taken.tables) == {"answers/start", "samples", "answers/end"}
    assert taken.tables["answers/end"][0] == ["prompt", "answer"] and len(taken.tables["answers/end"][1]) == 6
    assert {"reward", "verdict", "feedback"} <= set(taken.tables["samples"][0])
