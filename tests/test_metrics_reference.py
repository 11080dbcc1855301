"""The tables of metrics name what runs log, and nothing else."""

import csv
import re
from pathlib import Path

import pytest

from opd_lightning.training.run import run

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("metrics.md", "metrics_reference.md")
RUNS = {
    "opd": "evaluation=study evaluation.suite.robustness.n=4 callbacks=estimators callbacks.estimators.every=1 "
    "callbacks.diagnostics.every=1",
    "text": "evaluation=text seed=1",
    "sft": "method=sft evaluation=text loss/reference=reverse_kl",
    "grpo": "method=grpo evaluation=sampled",
    "grpo_opd": "method=grpo_opd evaluation=none rollout.num_iterations=2 loss.policy_gradient.importance_sampling_cap=2",
    "sdft": "method=sdft callbacks.diagnostics.every=1 evaluation=validation",
    "sdpo": "method=sdpo evaluation=none",
    "opd_topk": "method=opd_topk evaluation=none loss/clip=positions",
    "routed": "teacher=routed teacher@teacher.teachers.prior=frozen evaluation=none",
}
ELSEWHERE = {
    "generator/mismatch": "generation/copying.py",
    "train/gate": "losses/objective.py",
    "train/entry_clip_fraction": "losses/clip.py",
    "train/forward_kl_topk": "losses/diagnostics.py",
    "train/reverse_kl_topk": "losses/diagnostics.py",
    "train/log_ratio": "losses/diagnostics.py",
    "train/padding_mass": "losses/head.py",
    "train/unshared_mass": "losses/shared.py",
    "train/reference_unshared_mass": "losses/diagnostics.py",
    "rollout/<teacher>_unreadable": "teachers/reading.py",
    "rollout/leakage": "callbacks/diagnostics.py",
    "eval/<skill>/nll": "evaluation/reference_nll.py",
    "eval/<skill>/score": "evaluation/accuracy.py",
    "eval/harness/<task>.<metric>": "evaluation/harness.py",
}
"""Metrics that no small run here logs, and the modules that name them."""


def named() -> set[str]:
    """The names in the first columns of the pages' tables."""
    found: set[str] = set()
    for page in PAGES:
        for cell in re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE):
            found |= {name for name in re.findall(r"`([^`]+)`", cell) if "/" in name}
    return found


def pattern(name: str) -> re.Pattern:
    """The names that a name with <places> stands for."""
    return re.compile("".join(".+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<\w+>)", name)))


@pytest.mark.slow
def test_the_tables_name_what_runs_log(small, capsys):
    logged: set[str] = set()
    for line in RUNS.values():
        folder = run(small(*line.split()))
        with (folder / "metrics.csv").open() as file:
            logged |= {column for column in csv.DictReader(file).fieldnames or [] if "/" in column}
    names = named()
    assert sorted(name for name in logged if not any(pattern(n).fullmatch(name) for n in names)) == []
    unused = {n for n in names if not any(pattern(n).fullmatch(name) for name in logged)}
    assert unused == set(ELSEWHERE)


def test_names_that_no_small_run_logs_are_in_the_code():
    for name, module in ELSEWHERE.items():
        last = re.split(r"[/>]", name.replace("<task>.<metric>", "harness"))[-1].strip("_")
        assert last in (ROOT / "opd_lightning" / module).read_text(), name


def test_every_metric_has_a_meaning_and_what_to_do():
    for page in PAGES:
        for line in (ROOT / "docs" / page).read_text().splitlines():
            if re.match(r"\| `\w+/", line):
                cells = [cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")]
                assert len(cells) in (2, 4) and all(cells), line
