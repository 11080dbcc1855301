"""A study's statistics and its report: intervals that cover, verdicts that are earned, and nothing averaged in silence."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from opd_lightning.dashboard import PANELS, workspace
from opd_lightning.reporting.answer import answer
from opd_lightning.reporting.compare import NONE_SHOWN, ONE_SEED, choose_rates, compare
from opd_lightning.reporting.headline import chosen
from opd_lightning.reporting.runs import load_study
from opd_lightning.reporting.statistics import holm, over_prompts, over_seeds
from opd_lightning.reporting.terminal import terminal
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.study import rates, report
from opd_lightning.training.run import run


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
    assert not one.bounded and one.p == 1.0 and str(one) == "+1.000"
    same = over_seeds({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5})
    assert (same.low, same.high, same.p) == (0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="no seed is in both"):
        over_seeds({0: 1.0}, {1: 1.0})
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_bootstrap_over_prompts_never_supports_a_verdict():
    found = over_prompts([1.0] * 200, [0.0] * 100 + [1.0] * 100)
    assert found.mean == 0.5 and 0.42 < found.low < 0.45 and found.p == 1.0 and "this run only" in found.over


def write_run(folder: Path, method: str, seed: int, new: float, prior: float, **more) -> None:
    """A finished run's files, with the numbers of the end given; `end` replaces them, `target` None asks for no accuracy."""
    cell = folder / f"{method}-{more.get('hash', '0' * 8)}" / f"seed-{seed}"
    cell.mkdir(parents=True)
    start, end = {"step": 0, "new/accuracy": 0.0, "prior/accuracy": 1.0}, {"new/accuracy": new, "prior/accuracy": prior}
    end |= {"step": 50, "validation/new/accuracy": new, "validation/prior/accuracy": prior}
    if "end" in more:
        start, end = {"step": 0, **dict.fromkeys(more["end"], 0.0)}, {"step": 50, **more["end"]}
    costs = [
        {"step": s, "student_tokens": s * 10.0, "teacher_tokens": 0.0, "flops": s * 1e6, "seconds": s * 0.1} for s in (0, 50)
    ]
    examples = {"accuracy": {"n": more.get("n", 256), "digest": "a"}}
    evaluation = {"start": start, "end": end, "history": [start, end], "intervals": {}, "costs": costs, "examples": examples}
    budget = {
        "student_tokens": None,
        "flops": None,
        "seconds": None,
        "accuracy": more.get("target", 0.9),
        "metric": "validation/new/accuracy",
    }
    config = {"name": method, "seed": seed, "study": {"name": "s", "baseline": "sft"}, "optim": {"lr": more.get("lr", 1e-4)}}
    config |= {
        "budget": budget | {"metric": "validation/new/accuracy", "in_a_row": 2},
        "trainer": {"max_steps": 100},
        "evaluation": {"suite": more.get("suite", {})},
    }
    ended = "budget.accuracy" if new >= 0.9 else "trainer.max_steps"
    status = {"state": more.get("state", "finished"), "ended_by": ended, "step": 50, "start_model": [more.get("start", "m")]}
    ledger = {"tokens": {"student_tokens": 500}, "flops": {"forward": 10}, "seconds": {"update": 5.0}, "steps": 50}
    ledger |= {"flops": {"forward": more.get("flops", 10)}, "peak_memory": {"resident_mib": 100.0}}
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


def printed(folder: Path, width: int = 100) -> str:
    """What the terminal shows."""
    runs, left_out = load_study(folder)
    return "\n".join(terminal(runs, compare(runs), left_out, width))


def test_a_verdict_needs_an_interval_and_censored_methods_are_listed_not_compared(study):
    runs, _ = load_study(study)
    compared = compare(runs)
    found = {(c.metric, c.method): c for c in compared.comparisons}
    assert found["prior/accuracy", "sdft"].verdict == "higher" and found["prior/accuracy", "opd"].verdict == NONE_SHOWN
    assert not any(method == "grpo" for _, method in found)
    assert compared.reasons == {"grpo": "1 of 3 runs did not reach the target"}
    page = report(study).read_text()
    assert "3, 1 censored" in page and "Grpo is not compared: 1 of 3" in page
    told = printed(study)
    assert re.search(r"grpo +2 of 3 ", told) and "grpo: not compared, 1 of 3 runs did not reach the target" in told
    assert re.search(r"sdft +none shown +\+0.204 higher", told) and re.search(r"opd +none shown +none shown", told)
    assert "nothing is compared with grpo: 1 of 3" in compare(runs, "grpo").sentences[0]
    assert {c.baseline for c in compare(runs, "opd").comparisons} == {"opd"}
    with pytest.raises(ValueError, match="--against nobody is no method"):
        compare(runs, "nobody")


def outputs(folder: Path, capsys) -> dict[str, str]:
    """Everything that a report says."""
    told = {"html": report(folder).read_text(), "terminal": capsys.readouterr().out}
    return told | {name: (folder / f"{name}.csv").read_text() for name in ("results", "comparisons")}


def test_a_single_seed_decides_nothing_and_that_is_said_once(tmp_path, capsys):
    for method, prior in (("sft", 0.1), ("sdft", 0.9), ("opd", 0.8), ("grpo", 0.7)):
        write_run(tmp_path, method, 4, 0.95, prior)
    told = outputs(tmp_path, capsys)
    assert {c.verdict for c in compare(load_study(tmp_path)[0]).comparisons} == {ONE_SEED}
    for text in (told["terminal"], told["html"]):
        assert text.count("One seed decides nothing") == 1 and "seed=4,5,6" in text and "undecided" not in text
    assert not any(word in told["terminal"] for word in ("none shown", "higher", "lower"))
    rows = list(csv.DictReader(told["comparisons"].splitlines()))
    assert rows and all(row["low"] == row["high"] == row["p"] == "" for row in rows)
    assert not any(re.search(r"\b(inf|nan)\b", re.sub(r"base64,[^\"]*", "", text)) for text in told.values())


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_six_methods_take_fifteen_rows_of_100_columns(tmp_path, seeds):
    rng = np.random.default_rng(0)
    for method in ("sft", "kd", "opd", "opd_sampled", "sdft", "grpo"):
        for seed in range(seeds):
            end = {"new/accuracy": rng.uniform(0.9, 1), "prior/accuracy": rng.uniform(), "robust/mean": rng.uniform()}
            write_run(tmp_path, method, seed, 0.95, 0, end=end, flops=int(rng.integers(1e9, 9e11)))
    for width in (80, 100, 140):
        rows = printed(tmp_path, width).splitlines()
        assert len(rows) <= (14 if width >= 100 else 15) and max(map(len, rows)) <= width
    assert bool(re.search(r"\[0\.\d{3}, [01]\.\d{3}\]", printed(tmp_path))) == (seeds > 1)


def test_a_narrow_terminal_wraps_names_and_never_cuts_digits(tmp_path):
    for i, rate in enumerate((1e-4, 2e-4)):
        for seed in (0, 1):
            end = {"heldout/log_likelihood": -1.25 - i - seed / 3, "heldout/reverse_kl": 0.125 + i, "new/accuracy": 0.5}
            name = "an_experiment_with_a_long_name" * 2
            write_run(tmp_path, name, seed, 0.5, 0, end=end, target=None, lr=rate, hash=str(i) * 8)
    rows = printed(tmp_path, 80).splitlines()
    assert max(map(len, rows)) <= 80 and all(number in " ".join(rows) for number in ("-1.417", "-2.417", "0.125", "1.125"))


@pytest.mark.parametrize(
    ("end", "names"),
    [
        ({"heldout/log_likelihood": -1.0, "heldout/reverse_kl": 0.5}, ["heldout/log_likelihood", "heldout/reverse_kl"]),
        ({"general/accuracy": 0.5, "general/length": 3.0}, ["general/accuracy"]),
        ({"new/length": 3.0}, ["new/length"]),
        ({"validation/new/accuracy": 0.5}, ["validation/new/accuracy"]),
        ({}, []),
    ],
)
def test_other_studies_are_told_by_what_they_measured(tmp_path, capsys, end, names):
    for method in ("sft", "opd"):
        for seed in (0, 1):
            values = {name: value + 0.01 * seed * (method == "opd") for name, value in end.items()}
            write_run(tmp_path, method, seed, 0, 0, end=values, target=None, flops=10 + 5 * (method == "opd"))
    assert [headline.name for headline in chosen(load_study(tmp_path)[0])] == names
    told = outputs(tmp_path, capsys)
    assert "FLOPs" in told["terminal"] and "In FLOPs, sft cost least" in told["html"]
    assert (tmp_path / "picture.png").is_file() == bool(names)


def test_the_page_opens_with_the_answer_and_folds_the_rest(study):
    page = report(study).read_text()
    opening = page.split("<details>")[0]
    order = ['class="answer"', "<img", "<table>"]
    assert [opening.count(part) for part in order] == [1, 1, 1] and sorted(order, key=opening.index) == order
    assert (
        "prior skills were kept best by sdft: 0.704, against 0.500 by sft (sdft is higher with 3 seeds: +0.204 ["
        in opening.lower()
    )
    assert "missed by grpo in 1 of 3 runs" in opening and opening.count(". ") + 1 >= 3
    assert not re.search(r"<(table|img)", re.sub(r"<details>.*</details>", "", page.replace(opening, ""), flags=re.DOTALL))


def test_the_answer_of_one_method_and_of_missed_targets(tmp_path):
    write_run(tmp_path, "sft", 0, 0.3, 0.9)
    runs, _ = load_study(tmp_path)
    assert answer(runs, compare(runs)) == [
        "There is one method, sft, so nothing is compared.",
        "It changed new skill from 0.000 to 0.300 and prior skills from 1.000 to 0.900.",
    ]
    for method, seed in (("sft", 1), ("opd", 0), ("opd", 1)):
        write_run(tmp_path, method, seed, 0.3, 0.9)
    runs, _ = load_study(tmp_path)
    told = answer(runs, compare(runs))
    assert (
        told[0] == "No method reached 0.9 on the new skill with every seed." and "All methods are equal in new skill" in told[1]
    )
    assert "Nothing is compared with sft: 2 of 2 runs did not reach the target." in printed(tmp_path)


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
    compared = compare(load_study(study)[0])
    assert {c.method for c in compared.comparisons} == {"sdft"}
    assert {"opd is not compared: it had another budget", "kd is not compared: no seed is in both"} <= set(compared.sentences)


def test_missing_seeds_are_named(study):
    for seed in (1, 2):
        shutil.rmtree(study / "opd-00000000" / f"seed-{seed}")
    assert "opd: one seed in common with sft, which decides nothing" in printed(study)
    assert any("opd-00000000 has no finished run of seed 1, 2" in sentence for sentence in load_study(study)[1])


def test_a_seed_in_another_precision_is_named_and_stays(study):
    for seed, precision in enumerate(("bf16-mixed", "32-true", "bf16-mixed")):
        path = study / "opd-00000000" / f"seed-{seed}" / "config.yaml"
        path.write_text(path.read_text().replace("trainer:\n", f"trainer:\n  precision: {precision}\n"))
    runs, sentences = load_study(study)
    assert len(runs) == 12
    assert "opd-00000000/seed-1 was trained in 32-true, most of its other seeds in bf16-mixed" in sentences


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
