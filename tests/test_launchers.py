"""Sweeps by every launcher: cells in processes of their own, and the table of a sweep without one."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}
OPTIONS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=1", "+hydra.launcher.ray.init.include_dashboard=false"],
}
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
COSTS = ("seconds", "peak_mib")


def call(module: str, *arguments: str) -> str:
    """A command's output; it must succeed."""
    variables = os.environ | RAY | {"OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(study: Path) -> list[dict[str, str]]:
    """The report's table of a sweep, without what depends on the machine."""
    call("opd_lightning.study", str(study))
    with (study / "results.csv").open() as file:
        found = [{key: value for key, value in row.items() if key not in COSTS} for row in csv.DictReader(file)]
    return sorted(found, key=str)


@pytest.fixture(scope="module")
def sweep(tiny, other, tmp_path_factory):
    """Makes a sweep of two cells, and returns its table."""
    out = tmp_path_factory.mktemp("sweeps")
    given = {"model.path": tiny, "model.teacher": other, "output_dir": out, "trainer.accelerator": "cpu"}
    given |= {"trainer.max_steps": 2, "data.batch_size": 4, "task.n_train": 16, "task.n_eval": 8, "logger": "none"}

    def make(launcher: str) -> list[dict[str, str]]:
        line = [f"study.name={launcher}", f"hydra/launcher={launcher}", *OPTIONS.get(launcher, [])]
        output = call("opd_lightning", "-m", *(f"{k}={v}" for k, v in given.items()), "method=sft,opd", *line)
        assert "2 finished" in output
        return rows(out / launcher)

    return make


@pytest.fixture(scope="module")
def expected(sweep) -> list[dict[str, str]]:
    return sweep("basic")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_sweep_by_another_launcher_has_the_same_table(launcher, sweep, expected):
    if importlib.util.find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is None:
        pytest.skip(f"{PLUGINS[launcher]} is not installed")
    assert len(expected) == 2 and sweep(launcher) == expected
