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

from experiments.analyze import HERE, STYLES, cell, collect, draw, ends, interval, pages, read_page, rewritten, styles, table
from experiments.benchmarks import run as benchmarks
from opd_lightning.config import compose
from opd_lightning.toy.pretrain import Mixture, sample_sequence
from opd_lightning.toy.world import PRIOR

ROOT = Path(__file__).resolve().parents[1]
ONE_UPDATE = ("trainer.max_steps=1", "data.batch_size=2", "evaluation.every=1")
FIRST = ",".join(f"'{override}'" for override in ("{}", *ONE_UPDATE, "evaluation.answers=null"))
FEW = "evaluation.suite.{}.n=2"
BEGINNINGS = {
    "smollm2_opd": [f"init_from_run=[{FIRST.format('experiment=smollm2_narrow')}]", FEW.format("divergence")],
    "smollm2_keep": [f"init_from_run=[{FIRST.format('experiment=smollm2_facts')}]", FEW.format("original")],
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


@pytest.mark.slow
@pytest.mark.parametrize("study", SWEEPS)
def test_a_study_is_made_and_collected(study, tmp_path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    short = [*ONE_UPDATE, *SWEEPS[study], "logger=none", "callbacks.progress=null", f"output_dir={tmp_path / 'outputs'}"]
    code, output, _ = command("-m", f"study={study}", "seed=0,1", *short, defaults=False)
    assert code == 0, output
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


def finished_run(folder: Path, seed: int, start: str = "opd_lightning/toy/assets/world/start", name: str = "sft") -> None:
    """What `collect` reads of a run of study=forgetting."""
    folder.mkdir(parents=True)
    history = [
        {"step": 0, "new/accuracy": 0.0, "prior/accuracy": 1.0},
        {"step": 5, "new/accuracy": 0.96, "prior/accuracy": 0.25},
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "seed": seed, "model": {"path": start}}))
    for file, content in {
        "status": {"state": "finished", "ended_by": "budget.accuracy"},
        "evaluation": {"history": history},
        "ledger": {"steps": 5, "tokens": {}, "flops": {"forward": 1}},
    }.items():
        (folder / f"{file}.json").write_text(json.dumps(content))


def test_collected_runs_replace_their_own_rows_and_keep_all_others(tmp_path):
    page, study = tmp_path / "forgetting", tmp_path / "outputs" / "forgetting"
    shutil.copytree(HERE / "forgetting", page)
    before, rates = (page / "results.csv").read_text().splitlines(), (page / "rates.csv").read_text()
    finished_run(study / "sft-1" / "seed-1", 1)
    finished_run(study / "sft-1" / "seed-7", 7)
    told = ["results.csv: 1 runs replaced, 1 added, 149 kept", "rates.csv: 0 runs replaced, 0 added, 90 kept"]
    assert collect(page, tmp_path / "outputs") == told
    after = (page / "results.csv").read_text().splitlines()
    place = next(i for i, line in enumerate(before) if line.startswith("sft,opd_lightning/toy/assets/world/start,1,"))
    made = [f"sft,opd_lightning/toy/assets/world/start,{seed},5,0.96,0.25,5,1,True" for seed in (1, 7)]
    assert after == [*before[:place], made[0], *before[place + 1 :], made[1]] and (page / "rates.csv").read_text() == rates
    assert all(f"\n|{start}|" in table(page) for start in "ABCDEFGHI")
    assert collect(page, tmp_path / "outputs")[0] == "results.csv: 2 runs replaced, 0 added, 149 kept"
    assert (page / "results.csv").read_text().splitlines() == after
    finished_run(study / "sft-2" / "seed-7", 7)
    with pytest.raises(ValueError, match="same labels and seed"):
        collect(page, tmp_path / "outputs")
    assert (page / "results.csv").read_text().splitlines() == after


def test_two_runs_with_the_same_labels_seed_and_step_are_refused():
    rows = [{"arm": "a", "seed": 0.0, "step": 5.0, "x": 1.0}, {"arm": "a", "seed": 0.0, "step": 10.0, "x": 2.0}]
    assert ends(rows, "x") == ends(rows, ["y", "x"]) == {0.0: 2.0}
    with pytest.raises(ValueError, match=r"same labels, seed \(0\) and step \(5\)"):
        ends([*rows, {"arm": "a", "seed": 0.0, "step": 5.0, "x": 1.0}], "x")


def test_only_runs_that_reached_the_target_are_compared():
    rows = [
        {"arm": a, "seed": s, "step": 1, "x": x, "reached": str(a != "c" or s == 0)}
        for s in (0, 1)
        for a, x in (("a", 1.0), ("b", 0.5), ("c", 0.75))
    ]
    less = {"number": "x", "less": {"arm": "b"}}
    assert [cell(rows, {"arm": a}, less) for a in "abc"] == ["+0.500", "", ""] and cell(rows, {"arm": "c"}, {"number": "x"})
    assert cell(rows, {"arm": "a"}, less | {"less": {"arm": "c"}}) == ""
    (kd,) = [line for line in table(HERE / "demo").splitlines() if line.startswith("|kd|")]
    assert kd.split("|")[4] == "" and kd.split("|")[3].startswith("0.981")


def test_a_method_has_one_style_in_all_figures():
    for names in (["grpo", "kd", "opd"], ["opd", "grpo", "other"], ["smollm2_keep-opd", "another", "sft"]):
        found = dict(zip(names, styles(names), strict=True))
        assert len(set(found.values())) == 3 and all(found[name] == STYLES[name] for name in names if name in STYLES)
    assert styles(["smollm2_keep-opd", "opd_sampled"]) == [STYLES["opd"], STYLES["opd_sampled"]]
    assert styles(["x", "y"]) == [0, 1]
    assert len(set(styles(["x"] * 40))) == 40


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
        rows = list(csv.DictReader(file))
    assert {"matmul", "ours", "ours_generic", "naive"} <= {row["way"] for row in rows}
    measured = [row["measure"] for row in rows]
    assert measured.count("time") >= 3 * 4 and measured.count("memory") == 2 * 3 and all(row["peak_mib"] for row in rows)


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
