"""The checks of a machine with a GPU, rehearsed on the CPU."""

import argparse
import json
import zipfile

import pytest

from experiments.gpu import parts, run


def options(folder) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", small=True, out=folder)


def test_wheels_are_unpacked_where_there_are_some(tmp_path):
    assert run.unpacked(None, tmp_path / "site") == run.unpacked(tmp_path / "none", tmp_path / "site") == []
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as wheel:
        wheel.writestr("one/__init__.py", "x = 1\n")
    assert run.unpacked(tmp_path, tmp_path / "site") == [str(tmp_path / "site")]
    assert (tmp_path / "site" / "one" / "__init__.py").is_file()


def test_a_part_that_fails_or_takes_too_long_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    failed = run.part("losses", 10, options(tmp_path), [])
    (tmp_path / "slow").write_text("#!/bin/sh\necho before\nsleep 60\n")
    (tmp_path / "slow").chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(tmp_path / "slow"))
    slow = run.part("losses", 0.2, options(tmp_path), [])
    monkeypatch.undo()
    assert failed["state"] == "failed" and slow["state"].startswith("stopped after") and slow["reason"] == "before"
    found = {"machine": {"device": "cpu", "cores": 2, "commit": "x"}, "small": True, "seconds": 1.0, "parts": [failed, slow]}
    assert "|losses|failed|||NO|" in run.table(found)


def test_seconds_that_are_predicted_have_no_rate_and_no_peak(capsys):
    timed = {"way": "ours", "work": "opd, 2 prompts", "seconds": "2", "rollout": "1", "score": "1", "update": "0"}
    timed |= {"tokens_per_second": "9", "peak_mib": "5"}
    parts.tell_steps([timed, timed | {"way": "unavoidable", "tokens_per_second": "", "peak_mib": ""}])
    rows = [json.loads(line.removeprefix("ROW ")) for line in capsys.readouterr().out.splitlines()]
    assert [row["value"] for row in rows] == ["2 (rollout 1, score 1, update 0)", "9; 5", "2 (rollout 1, score 1, update 0)"]


@pytest.mark.slow
def test_the_checks_are_rehearsed_without_a_gpu(tmp_path):
    assert run.main(["--device", "cpu", "--small", "--out", str(tmp_path), "--only", "losses", "fsdp2", "step"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one["state"] for one in found["parts"]] == ["done"] * 3 and all(one["rows"] for one in found["parts"])
    assert "|fsdp2|greatest difference of weights" in (tmp_path / "table.md").read_text()
