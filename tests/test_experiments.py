"""The experiments' pages hold what their numbers give, and their commands still work, shrunken."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.analyze import HERE, cell, collect, draw, interval, pages, read_page, rewritten, table
from experiments.benchmarks import run as benchmarks
from opd_lightning.config import compose
from opd_lightning.toy.pretrain import Mixture, sample_sequence
from opd_lightning.toy.world import PRIOR

ROOT = Path(__file__).resolve().parents[1]
ONE_UPDATE = ("trainer.max_steps=1", "data.batch_size=2", "evaluation.every=1")
FIRST = ",".join(f"'{override}'" for override in ("{}", *ONE_UPDATE, "evaluation.answers=null"))
FEW = "evaluation.suite.{}.n=2"
BEGINNINGS = {
    "smollm2_opd": [f"start_from=[{FIRST.format('experiment=smollm2_narrow')}]", FEW.format("divergence")],
    "smollm2_keep": [f"start_from=[{FIRST.format('experiment=smollm2_facts')}]", FEW.format("original")],
    "smollm2_rule": ["~evaluation.suite.accuracy", FEW.format("divergence"), FEW.format("teacher")],
    "smollm2_rule_sft": ["~evaluation.suite.accuracy", FEW.format("divergence"), FEW.format("teacher")],
}
"""Experiments on SmolLM2's weights, and what makes them short."""
SHIPPED = "model.path=opd_lightning/toy/assets/world/start"
SWEEPS = {
    "teachers": ["teacher=frozen", "task.n_eval=8"],
    "forgetting": ["method=sft", "task.n_eval=8", SHIPPED],
    "exposure": ["rollout=student", "task.length=5", "task.n_eval=8", SHIPPED, "model.teacher=${model.path}/../teacher"],
}
"""Studies of the embedded model, and what makes them short."""


@pytest.mark.parametrize("folder", pages(), ids=lambda folder: folder.name)
def test_a_page_has_the_table_that_its_numbers_give(folder):
    text = (folder / "README.md").read_text()
    assert rewritten(folder) == text and table(folder) in text
    assert len(text.split()) <= 350 and "](figure.png)" in text and "**How far this carries.**" in text


def test_the_index_names_every_page_and_all_are_short():
    index = (HERE / "README.md").read_text()
    assert all(f"({folder.name}/README.md)" in index for folder in pages())
    texts = [index, *((folder / "README.md").read_text() for folder in pages())]
    assert sum(len(text.split()) for text in texts) <= 4000


@pytest.mark.parametrize("folder", pages(), ids=lambda folder: folder.name)
def test_a_page_draws_its_figure(folder, tmp_path):
    shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / folder.name / "figure.png").unlink()
    draw(tmp_path / folder.name)
    assert (tmp_path / folder.name / "figure.png").stat().st_size > 5000


def test_every_study_of_a_page_is_a_configuration():
    asked = {study for folder in pages() for spec in read_page(folder).get("files", {}).values() for study in spec["studies"]}
    there = {path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")}
    assert {study.removesuffix(".stages") for study in asked} == there
    commands = "".join((folder / "README.md").read_text() for folder in pages())
    assert all(f"study={study}" in commands for study in there)


def sweep(study: str, folder: Path) -> None:
    """A study of a few one-update runs."""
    short = [*ONE_UPDATE, *SWEEPS[study], "logger=none", "callbacks.progress=null", f"output_dir={folder}"]
    line = [sys.executable, "-m", "opd_lightning", "-m", f"study={study}", "seed=0,1", *short]
    subprocess.run(line, check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("study", ["teachers", *(pytest.param(s, marks=pytest.mark.slow) for s in SWEEPS if s != "teachers")])
def test_a_study_is_made_and_collected(study, tmp_path):
    sweep(study, tmp_path / "outputs")
    shutil.copytree(HERE / study, tmp_path / study)
    (tmp_path / study / "results.csv").unlink()
    spec = read_page(tmp_path / study)["files"]["results.csv"]
    for other in [name for name in read_page(tmp_path / study)["files"] if name != "results.csv"]:
        page = (tmp_path / study / "page.yaml").read_text()
        (tmp_path / study / "page.yaml").write_text(re.sub(rf"  {other}:.*?\nnames:", "names:", page, flags=re.DOTALL))
    collect(tmp_path / study, tmp_path / "outputs")
    with (tmp_path / study / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and {row["seed"] for row in rows} == {"0", "1"} and all(row[label] for row in rows for label in spec["labels"])
    assert all(any(row[number] for row in rows) for number in spec["numbers"])


def test_runs_that_are_missing_are_said(tmp_path):
    shutil.copytree(HERE / "demo", tmp_path / "demo")
    with pytest.raises(ValueError, match="no finished run"):
        collect(tmp_path / "demo", tmp_path)


def test_a_cell_is_a_mean_or_a_paired_difference():
    rows = [
        {"arm": a, "seed": s, "step": 1, "x": x} for a, s, x in [("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, 0.5), ("b", 1, 0.5)]
    ]
    rows.append({"arm": "b", "seed": 2, "step": 1, "x": 9.0})
    assert cell(rows, {"arm": "a"}, {"number": "x"}).startswith("1.500±6.35")
    assert cell(rows, {"arm": "a"}, {"number": "x", "less": {"arm": "b"}}).startswith("+1.000±6.35")
    assert cell(rows, {"arm": "a"}, {"number": "x", "less": {"arm": "c"}}) == ""
    assert cell([*rows, {"arm": "a", "seed": 0, "step": 2, "x": 2.0}], {"arm": "a"}, {"number": "x"}) == "2.000"
    assert interval([1.0], ".3f") == "1.000" and interval([0.0, 0.0], ".3f") == "0.000" and interval([], ".3f") == ""


@pytest.mark.slow
def test_the_benchmark_of_the_loss_still_runs(tmp_path):
    benchmarks.main(["--small", "--results", str(tmp_path / "results.csv")])
    with (tmp_path / "results.csv").open() as file:
        ways = [row["way"] for row in csv.DictReader(file)]
    assert {"matmul", "ours", "ours_generic", "naive"} <= set(ways) and len(ways) >= 3 * 4 + 2 * 3


@pytest.mark.parametrize("study", ["smollm2_keep", "smollm2_recovery", "smollm2_rule"])
def test_a_study_on_real_weights_is_composed(study):
    params = yaml.safe_load((ROOT / "conf" / "study" / f"{study}.yaml").read_text())["hydra"]["sweeper"]["params"]
    first = [f"{key}={str(value).split(',')[0]}" for key, value in params.items() if "${" not in str(value)]
    assert compose([f"study={study}", *first]).name.startswith("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "smollm2-135m-instruct").is_dir(), reason="make smollm2 first")
@pytest.mark.parametrize("name", BEGINNINGS)
def test_an_experiment_on_real_weights_still_begins(tmp_path, name):
    """One update of its first stage and one of its own, each evaluated on a few prompts."""
    line = [f"experiment={name}", *ONE_UPDATE, *BEGINNINGS[name], "logger=none", f"output_dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "opd_lightning", *line], check=True, cwd=ROOT, capture_output=True)
    (run,) = tmp_path.glob(f"**/{name}-*/seed-0/evaluation.json")
    assert all(np.isfinite(value) for value in json.loads(run.read_text())["end"].values() if value is not None)


@pytest.mark.parametrize("obey", [0.0, 0.5, 1.0])
def test_the_share_of_demonstrations_that_decide_is_what_was_asked(obey):
    rng, seen = np.random.default_rng(0), []
    for _ in range(3000):
        prompt, answer, _ = sample_sequence(rng, Mixture(obey=obey, guess=0.0))
        name, *rest = prompt.split("[ result ]")[-1].split("[ answer ]")[-1].split("[ done ]")[-1].split()
        if "[" in rest and name in PRIOR:
            digits = [[w for w in text.split() if w.isdigit()] for text in (" ".join(rest).split("[")[1], answer)]
            right = [str(d) for d in PRIOR[name](tuple(int(w) for w in rest[:5]))]
            seen += [digits[0] == digits[1]] if digits[0] != right else []
    assert len(seen) > 300 and abs(np.mean(seen) - obey) < 0.06
