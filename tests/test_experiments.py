"""The experiments' folders do not rot: shrunken, each still makes its numbers and figures."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.benchmarks import run as benchmarks
from experiments.grid import KEPT, SHIPPED, Bench, fixed, paired, spread, table
from experiments.less_forgetting import fragile, run, tolerant
from experiments.likely import right_answers
from experiments.sequential.confusion import carried_out
from opd_lightning.tasks.pretrain_world import Mixture, sample_sequence
from opd_lightning.tasks.world import PRIOR, WorldTask

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/run.py"))
ARM = {"demo": "method"}
"""What an arm is called in results.csv, where it has a name of its own."""
ONE_UPDATE = ("trainer.max_steps=1", "data.batch_size=2", "evaluation.every=1")
FIRST = ",".join(f"'{override}'" for override in ("{}", *ONE_UPDATE, "evaluation.answers=null"))
FEW = "evaluation.suite.{}.n=2"
BEGINNINGS = {
    "smollm2_opd": [f"start_from=[{FIRST.format('experiment=smollm2_narrow')}]", FEW.format("divergence")],
    "smollm2_keep": [f"start_from=[{FIRST.format('experiment=smollm2_facts')}]", FEW.format("original")],
    "smollm2_rule": ["~evaluation.suite.accuracy", FEW.format("divergence"), FEW.format("teacher")],
}
"""Experiments on SmolLM2's weights, and what makes them short."""


def shrunken(name: str, folder: Path) -> None:
    """Two updates of one run per arm."""
    bench = Bench(folder / "results", folder / "out", jobs=1, small=True)
    importlib.import_module(f"experiments.{name}.run").main(bench)
    with (bench.results / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row[ARM.get(name, "arm")] for row in rows)
    trained = [row for row in rows if row.get("updates") != "0"]  # some folders tell the start model too
    assert list(bench.results.glob("*.png")) and len(list((folder / "out").glob("*/*/seed-*/ledger.json"))) >= len(trained) > 0


def test_one_experiment_still_runs(tmp_path, capsys):
    shrunken("few_prompts", tmp_path)
    assert "| `sdft` |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in ("few_prompts", "benchmarks")])
def test_every_experiment_still_runs(tmp_path, name, capsys):
    shrunken(name, tmp_path)
    assert "| --- |" in capsys.readouterr().out


def test_the_halves_of_less_forgetting_are_its_grid(tmp_path, monkeypatch):
    """Run after run alike, so that the runs of the two commands are found by the one that makes the tables."""
    made: list[str] = []
    monkeypatch.setattr(Bench, "starts", lambda self, wanted: dict.fromkeys(wanted, SHIPPED))
    monkeypatch.setattr(Bench, "run", lambda self, study, cells: made.extend(f"{study} {cell}" for cell in cells))
    for half in (tolerant, fragile):
        half.main(Bench(tmp_path))
    halves = sorted(made)
    made.clear()
    run.grid(Bench(tmp_path))
    assert halves == sorted(made) and len(set(made)) == 156


def test_a_start_model_that_is_kept_is_not_made_again(tmp_path, monkeypatch):
    made: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: made.append(command) or SimpleNamespace(wait=lambda: 0))
    found = Bench(tmp_path, tmp_path / "out").starts({"long": ["--fragile"], "other": ["--seed", "7"], "shipped": []})
    assert found == {"long": KEPT / "long", "other": tmp_path / "out" / "starts" / "other", "shipped": SHIPPED}
    assert [command[-2:] for command in made] == [["--seed", "7"]]


@pytest.mark.parametrize("made", sorted(KEPT.glob("*/*/made.json")), ids=lambda path: "-".join(path.parts[-3:-1]))
def test_a_start_model_that_is_kept_is_what_its_file_says(made):
    told = json.loads(made.read_text())
    assert not Path(told.get("base", "")).is_absolute()
    task = WorldTask(skill=told["skill"] or "rotate", n_eval=16, length=told["lengths"][-1])
    assert (right_answers(made.parent, task) > 0.9) == bool(told["teach"])


@pytest.mark.slow
def test_the_benchmark_of_the_loss_still_runs(tmp_path):
    """It has ways instead of arms, and makes no runs."""
    benchmarks.main(Bench(tmp_path, small=True))
    with (tmp_path / "results.csv").open() as file:
        ways = [row["way"] for row in csv.DictReader(file)]
    assert {"matmul", "ours", "ours_generic", "naive"} <= set(ways) and len(ways) >= 3 * 4 + 2 * 3
    assert (tmp_path / "cost.png").is_file() and (tmp_path / "head.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "smollm2-135m-instruct").is_dir(), reason="make smollm2 first")
@pytest.mark.parametrize("name", BEGINNINGS)
def test_an_experiment_on_real_weights_still_begins(tmp_path, name):
    """One update of its first stage and one of its own, each evaluated on a few prompts."""
    line = [f"experiment={name}", *ONE_UPDATE, *BEGINNINGS[name], "logger=none", f"output_dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "opd_lightning", *line], check=True, cwd=ROOT, capture_output=True)
    (run,) = tmp_path.glob(f"**/{name}-*/seed-0/evaluation.json")
    assert all(np.isfinite(value) for value in json.loads(run.read_text())["end"].values() if value is not None)


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in (ROOT / "experiments").glob("*/README.md")))
def test_every_folder_is_in_the_index(folder):
    assert f"({folder}/README.md)" in (ROOT / "experiments" / "README.md").read_text()


def test_the_probability_of_right_answers_and_the_operation_that_is_carried_out():
    start, teacher = SHIPPED / "start", SHIPPED / "teacher"
    task = WorldTask(n_eval=32)
    assert right_answers(start, task, shown=True) > 0.99 and right_answers(teacher, task) > 0.99
    assert 0.001 < right_answers(start, task) < 0.1
    assert carried_out(teacher, "rotate", 32)["rotate"] >= 0.97 and carried_out(start, "rotate", 32).get("rotate", 0) < 0.2


@pytest.mark.parametrize("obey", [0.0, 0.5, 1.0])
def test_the_dial_is_the_share_of_demonstrations_that_decide(obey):
    rng, seen = np.random.default_rng(0), []
    for _ in range(3000):
        prompt, answer, _ = sample_sequence(rng, Mixture(obey=obey, guess=0.0))
        name, *rest = prompt.split("[ result ]")[-1].split("[ answer ]")[-1].split("[ done ]")[-1].split()
        if "[" in rest and name in PRIOR:
            digits = [[w for w in text.split() if w.isdigit()] for text in (" ".join(rest).split("[")[1], answer)]
            right = [str(d) for d in PRIOR[name](tuple(int(w) for w in rest[:5]))]
            seen += [digits[0] == digits[1]] if digits[0] != right else []
    assert len(seen) > 300 and abs(np.mean(seen) - obey) < 0.06


def test_what_the_tables_are_made_of():
    rows = [
        {"arm": a, "seed": s, "x": x} for a, s, x in [("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, 0.5), ("b", 1, 0.5), ("b", 2, 9.0)]
    ]
    assert (
        paired(rows, "a", "b", "x").startswith("+1.000 [-5.3")
        and paired(rows[:3], "a", "b", "x") == "+0.500 (one pair)"
        and paired(rows, "a", "c", "x") == ""
    )
    assert spread([1.0]) == "1.000" and spread([1.0, 1.0]) == "1.000 (all equal)"
    assert table(["a"], [[1]]) == "| a |\n| --- |\n| 1 |"
    assert fixed("optim.lr=1", ["+optim.lr=2"]) and not fixed("optim.lr=1", ["optim.lr_=2"])
