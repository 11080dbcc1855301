"""A study's statistics and its report: intervals that cover, verdicts that are earned, and nothing averaged in silence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from opd_lightning.dashboard import PANELS, workspace
from opd_lightning.loggers import read_csv
from opd_lightning.report.compare import choose_rates, compare
from opd_lightning.report.runs import load_study
from opd_lightning.report.statistics import holm, over_prompts, over_seeds
from opd_lightning.study import rates, report
from opd_lightning.train import run


@pytest.mark.parametrize("sd", [0.0, 0.03, 0.08])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_default_interval_covers_what_new_seeds_would_show(seeds, sd):
    """1,000 simulated studies: two methods that differ by 0.1, 256 prompts of unequal difficulty, seeds that vary by sd."""
    rng = np.random.default_rng(seeds * 1000 + int(sd * 100))
    hard = rng.uniform(-0.2, 0.2, 256)
    covered, studies = 0, 1000
    for _ in range(studies):
        told = []
        for mean in (0.75, 0.65):
            skill = mean + rng.normal(0, sd, (seeds, 1)) / np.sqrt(2)
            told.append((rng.random((seeds, 256)) < skill + hard).mean(1))
        found = over_seeds(dict(enumerate(told[0])), dict(enumerate(told[1])))
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / studies <= 0.97


def test_intervals_by_hand():
    """d = 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.3027."""
    found = over_seeds({0: 1.0, 1: 2.0, 2: 3.0, 9: 7.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert (found.mean, found.seeds) == (2.0, 3) and found.high - 2 == pytest.approx(4.302653 / 3**0.5, abs=1e-5)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    one = over_seeds({0: 1.0}, {0: 0.0})
    assert one.low == -np.inf and one.p == 1.0
    same = over_seeds({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5})
    assert (same.low, same.high, same.p) == (0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="no seed is in both"):
        over_seeds({0: 1.0}, {1: 1.0})
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_bootstrap_over_prompts_never_supports_a_verdict():
    found = over_prompts([1.0] * 200, [0.0] * 100 + [1.0] * 100)
    assert found.mean == 0.5 and 0.42 < found.low < 0.45 and found.p == 1.0 and "this run only" in found.over


def write_run(folder: Path, method: str, seed: int, new: float, prior: float, **more) -> None:
    """A finished run's files, with the numbers of the end given."""
    cell = folder / f"{method}-{more.get('hash', '0' * 8)}" / f"seed-{seed}"
    cell.mkdir(parents=True)
    start, end = {"step": 0, "new/accuracy": 0.0, "prior/accuracy": 1.0}, {"new/accuracy": new, "prior/accuracy": prior}
    end |= {"step": 50, "validation/new/accuracy": new, "validation/prior/accuracy": prior}
    costs = [
        {"step": s, "student_tokens": s * 10.0, "teacher_tokens": 0.0, "flops": s * 1e6, "seconds": s * 0.1} for s in (0, 50)
    ]
    examples = {"accuracy": {"n": more.get("n", 256), "digest": "a"}}
    evaluation = {"start": start, "end": end, "history": [start, end], "intervals": {}, "costs": costs, "examples": examples}
    budget = {"student_tokens": None, "flops": None, "seconds": None, "accuracy": 0.9, "metric": "validation/new/accuracy"}
    config = {"name": method, "seed": seed, "study": {"name": "s", "baseline": "sft"}, "optim": {"lr": more.get("lr", 1e-4)}}
    config |= {
        "budget": budget | {"in_a_row": 2},
        "trainer": {"max_steps": 100},
        "evaluation": {"suite": more.get("suite", {})},
    }
    ended = "budget.accuracy" if new >= 0.9 else "trainer.max_steps"
    status = {"state": more.get("state", "finished"), "ended_by": ended, "step": 50, "start_model": [more.get("start", "m")]}
    ledger = {"tokens": {"student_tokens": 500}, "flops": {"forward": 10}, "seconds": {"update": 5.0}, "steps": 50}
    ledger |= {"peak_memory": {"resident_mib": 100.0}}
    for name, value in (("evaluation", evaluation), ("status", status | {"machine": {"python": "3"}}), ("ledger", ledger)):
        (cell / f"{name}.json").write_text(json.dumps(value))
    (cell / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def study(tmp_path) -> Path:
    """SFT forgets; SDFT keeps more, seed by seed; OPD differs by noise; GRPO misses the target once."""
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        write_run(tmp_path, "sft", seed, 0.95, 0.5 + noise)
        write_run(tmp_path, "sdft", seed, 0.95, 0.7 + noise + 0.004 * seed)
        write_run(tmp_path, "opd", seed, 0.95, 0.5 + 10 * noise * (-1) ** seed)
        write_run(tmp_path, "grpo", seed, 0.95 if seed else 0.3, 0.9)
    return tmp_path


def test_a_verdict_needs_an_interval_and_censored_methods_are_listed_not_compared(study):
    runs, _ = load_study(study)
    found = {(c.metric, c.method): c for c in compare(runs)[0]}
    assert found["prior/accuracy", "sdft"].verdict == "higher" and found["prior/accuracy", "opd"].verdict == "undecided"
    assert (
        "sdft is higher" in found["prior/accuracy", "sdft"].sentence and "3 seeds" in found["prior/accuracy", "sdft"].sentence
    )
    assert not any(method == "grpo" for _, method in found)
    page = report(study).read_text()
    assert "3, 1 censored" in page and "sdft is higher" in page and "opd is" not in page
    assert any("grpo is not compared: 1 of 3 runs did not reach the target" in note for note in compare(runs)[1])
    against, _ = compare(runs, "opd")
    assert "nothing is compared with grpo: 1 of 3" in compare(runs, "grpo")[1][0]
    assert {c.baseline for c in against} == {"opd"}
    with pytest.raises(ValueError, match="--against nobody is no method"):
        compare(runs, "nobody")


def test_a_single_seed_is_undecided_whatever_it_shows(tmp_path):
    write_run(tmp_path, "sft", 0, 0.95, 0.1)
    write_run(tmp_path, "sdft", 0, 0.95, 0.9)
    assert {c.verdict for c in compare(load_study(tmp_path)[0])[0]} == {"undecided"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 128}, "was evaluated on other examples"),
        ({"suite": {"other": 1}}, "was evaluated otherwise"),
        ({"start": "another"}, "began from another start model"),
        ({"state": "running"}, "is running"),
    ],
)
def test_what_cannot_be_compared_is_left_out_by_name(study, change, reason):
    write_run(study, "kd", 0, 0.95, 0.5, **change)
    runs, left_out = load_study(study)
    assert not any(run.name == "kd" for run in runs) and any(reason in sentence for sentence in left_out)


@pytest.mark.parametrize(
    ("name", "content"),
    [("status", ""), ("status", "[]"), ("evaluation", '{"end": {"x": NaN}}'), ("ledger", "{")],
)
def test_a_file_that_cannot_be_read_costs_one_run_not_the_report(study, name, content):
    (study / "opd-00000000" / "seed-1" / f"{name}.json").write_text(content)
    runs, left_out = load_study(study)
    assert len(runs) == 11 and any("opd-00000000/seed-1 cannot be read" in sentence for sentence in left_out)


def test_what_had_another_budget_or_no_seed_in_common_is_not_compared(study):
    write_run(study, "kd", 7, 0.95, 0.5)
    path = study / "opd-00000000" / "seed-0" / "config.yaml"
    path.write_text(path.read_text().replace("accuracy: 0.9", "accuracy: 0.5"))
    found, notes = compare(load_study(study)[0])
    assert {c.method for c in found} == {"sdft"}
    assert {"opd is not compared: it had another budget", "kd is not compared: no seed is in both"} <= set(notes)


def test_missing_seeds_are_named(study):
    shutil.rmtree(study / "opd-00000000" / "seed-2")
    assert any("opd-00000000 has no finished run of seed 2" in sentence for sentence in load_study(study)[1])


def test_rates_are_chosen_on_validation_among_those_that_reach_the_target(tmp_path):
    for rate, new, prior in ((1e-5, 0.5, 0.99), (1e-4, 0.95, 0.8), (1e-3, 0.97, 0.2)):
        for seed in (0, 1):
            write_run(tmp_path, "sft", seed, new, prior, lr=rate, hash=f"{rate:.0e}".replace("-", "m"))
    assert choose_rates(load_study(tmp_path)[0])["sft"][0] == 1e-4
    assert "sft: 0.0001" in rates(tmp_path) and "1 rates missed the target" in rates(tmp_path)


def test_the_dashboard_shows_what_runs_really_log(small):
    """Built without a network; every metric of every panel is a column of some preset's metrics.csv."""
    pytest.importorskip("wandb_workspaces")
    made = workspace("team", "project", "demo")._to_model().model_dump_json()
    assert all(title in made for panels in PANELS.values() for title, _, _ in panels) and '"demo"' in made
    logged = {"trainer/global_step"}
    for method in ("opd", "grpo"):
        for row in read_csv(
            run(small(f"method={method}", "evaluation=study", "callbacks.diagnostics.every=1")) / "metrics.csv"
        ):
            logged |= set(row)
    shown = {metric for panels in PANELS.values() for _, x, metrics in panels for metric in [x, *metrics] if metric}
    assert shown <= logged
