"""The commands as a user types them, in processes of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.study import main as report

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "150"}


def start(*arguments: str, module: str = "opd_lightning") -> subprocess.Popen:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def call(*arguments: str, module: str = "opd_lightning") -> tuple[int, str]:
    process = start(*arguments, module=module)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture
def tiny_run(tiny, other, tmp_path) -> list[str]:
    """Overrides of a run that takes a second, landing in tmp_path."""
    return [
        f"model.path={tiny}",
        f"model.teacher={other}",
        f"output_dir={tmp_path}",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
        "data.batch_size=4",
        "task.n_train=16",
        "task.n_eval=8",
    ]


def states(folder: Path) -> dict[str, str]:
    files = folder.glob("*/seed-*/status.json")
    return {str(f.parent.relative_to(folder)): json.loads(f.read_text())["state"] for f in files}


SMALL = ("trainer.max_steps=2", "task.n_train=16", "task.n_eval=8")


def test_a_sweep_makes_its_runs_skips_finished_ones_and_survives_a_broken_cell(command, tmp_path):
    """Four good cells, with W&B offline, beside ones that cannot work; the second call makes nothing again."""
    sweep = ["-m", *SMALL, "logger=wandb", "study.name=sweep", "method=sft,opd", "seed=0,1", "data.batch_size=4,0"]
    code, output, _ = command(*sweep)
    assert code != 0 and output.count("data.batch_size=0 must be at least 1") >= 4 and "Traceback" not in output
    found = states(tmp_path / "out" / "sweep")
    assert "4 failed, 4 finished" in output and output.count("is failed: ValueError: data.batch_size=0") == 4
    assert "sft, batch size 4, seed 1 -> " in output and "opd, batch size 0, seed 0 (opd-" in output
    assert sorted(found.values()) == ["failed"] * 4 + ["finished"] * 4 and {name.split("/")[1] for name in found} == {
        "seed-0",
        "seed-1",
    }
    assert list((tmp_path / "out" / "sweep").glob("*/seed-0/wandb/offline-run-*"))
    code, output, _ = command(*sweep)
    assert output.count("finished before, nothing to do") == 4
    assert not Path("multirun").exists() and (tmp_path / "out" / "sweep" / "multirun.yaml").exists()


def ends(folder: Path) -> dict[str, dict]:
    """The last evaluation and the tokens of every run."""
    runs = [path.parent for path in folder.glob("*/seed-*/ledger.json")]
    told = {
        f"{run.parent.name}/{run.name}": [json.loads((run / f"{n}.json").read_text()) for n in ("evaluation", "ledger")]
        for run in runs
    }
    return {name: (evaluation["end"], ledger["tokens"], ledger["flops"]) for name, (evaluation, ledger) in told.items()}


@pytest.mark.slow
def test_a_sweep_that_is_killed_half_way_is_finished_by_the_same_command(tiny_run, tmp_path):
    """SIGKILL while a cell trains: what was finished stays, the broken cell goes on, and the table is the unbroken one."""
    sweep = [
        "-m",
        *tiny_run,
        "trainer.max_steps=30",
        "callbacks.checkpoint.every=7",
        "logger=none",
        "method=sft,opd,grpo",
        "seed=0,1",
    ]
    process, folder, deadline = start(*sweep, "study.name=killed"), tmp_path / "killed", time.time() + 200
    while time.time() < deadline:
        told = list(states(folder).values())
        if told.count("finished") >= 2 and "running" in told and list(folder.glob("opd-*/seed-0/checkpoints/last.ckpt")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {
        path: path.stat().st_mtime
        for path in folder.glob("*/seed-*/status.json")
        if json.loads(path.read_text())["state"] == "finished"
    }
    assert 2 <= len(before) < 6
    code, output = call(*sweep, "study.name=killed")
    assert code == 0 and output.count("finished before, nothing to do") == len(before) and "6 finished" in output
    assert all(path.stat().st_mtime == at for path, at in before.items())
    assert call(*sweep, "study.name=whole")[0] == 0 and ends(folder) == ends(tmp_path / "whole")
    for name in ("killed", "whole"):
        assert call(str(tmp_path / name), module="opd_lightning.study")[0] == 0
    tables = [[row for row in csv.DictReader((tmp_path / n / "results.csv").open())] for n in ("killed", "whole")]
    for row in (row for table in tables for row in table):
        del row["seconds"], row["peak_mib"]
    assert tables[0] == tables[1] and len(tables[0]) == 6


def test_a_mistake_is_one_sentence_and_an_exit_code(tiny_run, command):
    """In a process of its own, and two more in this one."""
    code, output = call(*tiny_run, "logger=none", "method=sdft", "context=none")
    assert code == 1 and "choose context=demonstration" in output and "Traceback" not in output
    code, output, _ = command("study=demo")
    assert code == 1 and "add -m" in output and "Traceback" not in output


def test_a_report_is_written_from_the_runs_alone(command, tmp_path):
    assert command("-m", *SMALL, "study.name=s", "method=sft,sdft,grpo", "seed=0,1")[0] == 0
    assert command(*SMALL, "study.name=s", "task.n_eval=4")[0] == 0
    study = tmp_path / "out" / "s"
    code, output, _ = command(str(study), main=report, defaults=False)
    assert code == 0 and "was evaluated on other examples" in output
    page = (study / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page.split("<body>")[1].split("<pre>")[0]
    rows = (study / "results.csv").read_text().splitlines()
    assert len(rows) == 7 and rows[0].startswith("cell,label,method,seed,lr,ended_by,new/accuracy")
    code, output, _ = command(str(tmp_path), main=report, defaults=False)
    assert code == 1 and "no finished run" in output and "Traceback" not in output


def test_a_run_can_start_from_another_and_says_so(command, tmp_path, tiny):
    first = (
        f"init_from_run={json.dumps(['method=sft', 'data.batch_size=4', *SMALL, 'trainer.max_steps=1', f'model.path={tiny}'])}"
    )
    code, output, _ = command(*SMALL, "method=opd", first)
    assert code == 0, output
    folder = next((tmp_path / "out").glob("default/opd-*/seed-0"))
    lineage = json.loads((folder / "status.json").read_text())["start_model"]
    assert "/sft-" in lineage[0] and lineage[1] == tiny
    assert "/sft-" in yaml.safe_load((folder / "config.yaml").read_text())["model"]["path"]


@pytest.mark.slow
def test_an_interrupt_saves_and_the_same_command_goes_on(tiny_run, tmp_path):
    """SIGTERM in the middle; the weights end up equal to those of an unbroken run."""
    long = [*[o for o in tiny_run if "max_steps" not in o], "logger=none", "trainer.max_steps=60", "evaluation.every=60"]
    process = start(*long, "study.name=broken")
    deadline = time.time() + 120
    while not list(tmp_path.glob("broken/*/seed-0/metrics.csv")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    folder = next(tmp_path.glob("broken/*/seed-0"))
    status = json.loads((folder / "status.json").read_text())
    assert process.returncode != 0 and status["state"] == "interrupted" and 0 < status["step"] < 60, output
    assert call(*long, "study.name=broken")[0] == 0
    assert call(*long, "study.name=whole")[0] == 0
    files = [next(tmp_path.glob(f"{name}/*/seed-0/checkpoints/last.ckpt")) for name in ("broken", "whole")]
    a, b = (torch.load(f, weights_only=True)["state_dict"] for f in files)
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "method"), [("ddp", "sft"), ("ddp", "grpo"), ("fsdp2", "kd")])
def test_two_devices_train_like_one(tiny_run, tmp_path, trainer, method):
    """Over gloo, with micro-batches of few rows so that the devices' counts differ.

    SFT and KD must give the weights of one device. GRPO draws by rank, so it must only go through, silent steps included.
    FSDP2 stops half-way and goes on from its checkpoint.
    """
    two = [
        f"trainer={trainer}",
        "trainer.devices=2",
        "max_tokens_per_microbatch=40",
        f"method={method}",
        "logger=none",
        "study.name=two",
    ]
    base = [o for o in tiny_run if "max_steps" not in o]
    for steps in (2, 4) if trainer == "fsdp2" else (4,):
        code, output = call(*base, *two, f"trainer.max_steps={steps}")
        assert code == 0, output
    if method == "grpo":
        return
    assert call(*base, "logger=none", "trainer.max_steps=4", f"method={method}", "study.name=one")[0] == 0
    files = [next(tmp_path.glob(f"{name}/*/seed-0/checkpoints/last.ckpt")) for name in ("one", "two")]
    a, b = (torch.load(f, weights_only=True) for f in files)
    assert a["ledger"]["tokens"] == b["ledger"]["tokens"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    one, two = (torch.cat([c["state_dict"][k].flatten() for k in sorted(a["state_dict"])]) for c in (a, b))
    assert (one - two).abs().max() < 2e-6
    # AdamW hides the scale of a gradient; its norm and the loss do not.
    rows = [read_csv(f.parents[1] / "metrics.csv") for f in files]
    for name in ("train/grad_norm", "train/loss"):
        assert [r[name] for r in rows[0][1:]] == pytest.approx([r[name] for r in rows[1][1:]], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.r=2", "optim.lr=0.01"]], ids=["full", "lora"])
@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_two_devices_average_their_teacher_like_one(tiny_run, tmp_path, trainer, adapter):
    """Over gloo: student and moving-average teacher, on given completions; two devices stop half-way and go on."""
    base = [o for o in tiny_run if not o.startswith(("trainer.max_steps", "evaluation"))]
    base += [
        "method=kd",
        "teacher=ema",
        "teacher.rate=0.3",
        "context=demonstration",
        "max_tokens_per_microbatch=120",
        "evaluation=none",
    ]
    base += ["logger=none", *adapter]
    for devices in (["trainer.max_steps=4", "study.name=one"], *two_stages(trainer)):
        code, output = call(*base, *devices)
        assert code == 0, output
    files = [next(tmp_path.glob(f"{name}/*/seed-0/checkpoints/last.ckpt")) for name in ("one", "two")]
    a, b = (torch.load(f, weights_only=True) for f in files)
    for one, two in ((a["state_dict"], b["state_dict"]), *[[c["teachers"]["teacher"]["average"] for c in (a, b)]]):
        assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) < 5e-6


def two_stages(trainer):
    two = [f"trainer={trainer}", "trainer.devices=2", "study.name=two"]
    return [[*two, f"trainer.max_steps={steps}"] for steps in (2, 4)]
