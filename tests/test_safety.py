"""Nothing lost: guards speak up, damaged or foreign checkpoints are refused, and whatever kills a run, it goes on."""

import ctypes
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd_lightning.callbacks import Checkpoint, HealthChecks
from opd_lightning.callbacks.checkpoint import check_checkpoint, damage
from opd_lightning.config import compose
from opd_lightning.evaluation import Robustness
from opd_lightning.rollout.base import single_turn
from opd_lightning.runs.identity import run_folder
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.run import Stopped, run
from opd_lightning.types import Completion, Example, Rendered, SamplingParams
from opd_lightning.utils import errors
from opd_lightning.utils.atomic_files import locked, read_lines
from tests.templates import save_chat_model

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "150"}


EXAMPLE = Example("an example", [{"role": "user", "content": "copy 1"}])


def step(guards: HealthChecks, number: int = 1, ids=((1, 2, 3, 4, 5),), **seen) -> None:
    """One update with these logged numbers and completions."""
    logged = {"rollout/length": 5.0} | {name.replace("__", "/"): value for name, value in seen.items()}
    written = [Completion(list(row), "stop") for row in ids]
    samples = [single_turn(EXAMPLE, 0, Rendered([0]), completion, "student", False) for completion in written]
    tokens = SimpleNamespace(convert_ids_to_tokens=lambda i: f"<{i}>")
    renderer = SimpleNamespace(tokenizer=tokens, end_ids=[1])
    module = SimpleNamespace(rollout=SimpleNamespace(student_writes=True, sampling=SamplingParams(50, n=8)), renderer=renderer)
    outputs = {"samples": samples, "metrics": logged}
    guards.on_train_batch_end(SimpleNamespace(global_step=number, world_size=1), module, outputs, None, 0)


@pytest.mark.parametrize(
    ("name", "bad", "remedy"),
    [
        ("kl", {"train__reverse_kl": 50.0}, "lower optim.lr"),
        ("length", {"rollout__length": 50.0}, "rollout.sampling.max_new_tokens"),
        ("entropy", {"train__student_entropy": 1e-6}, "explores nothing"),
        ("frac_reward_zero_std", {"rollout__frac_reward_zero_std": 1.0}, "easier or harder prompts"),
        ("repetition", {"ids": ((7,) * 30,)}, "repeat themselves"),
        ("truncated", {"rollout__truncated": 1.0}, "never end"),
    ],
)
def test_each_guard_warns_once_with_its_remedy_and_stops_if_asked(caplog, name, bad, remedy):
    good = {
        "train__reverse_kl": 0.1,
        "train__student_entropy": 1.0,
        "rollout__frac_reward_zero_std": 0.1,
        "rollout__truncated": 0.0,
    }
    guards = HealthChecks(patience=3)
    with caplog.at_level(logging.WARNING):
        for number, seen in enumerate([good, good | bad, good | bad, good, *[good | bad] * 6]):
            step(guards, number, **seen)
    assert caplog.text.count("warning:") == 1 and remedy in caplog.text and name in caplog.text
    stopping = HealthChecks(patience=2, stop=True)
    step(stopping, **good)
    step(stopping, **(good | bad))
    with pytest.raises(ValueError, match=f"{name} has been"):
        step(stopping, **(good | bad))
    off = HealthChecks(patience=1, stop=True, **{name: None})
    step(off, **good)
    step(off, **(good | bad))


def test_a_guard_that_stops_leaves_a_run_that_can_go_on(small):
    cfg = small("method=opd", "trainer.max_steps=6", "callbacks.checkpoint.every=1", "callbacks.health_checks.kl=1e-9")
    cfg.callbacks.health_checks.patience, cfg.callbacks.health_checks.stop = 3, True
    with pytest.raises(ValueError, match="kl has been"):
        run(cfg)
    cfg.callbacks.health_checks.stop = False
    status = json.loads((run(cfg) / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 6)


def test_a_finished_run_says_that_it_was_measured_otherwise(small, caplog):
    """Evaluations do not make another run, so another interval is answered by the old numbers, and not in silence."""
    given = ["method=sft", "evaluation.every=1"]
    folder = run(small(*given))
    for more, told in (([], ""), (["evaluation.every=2"], "evaluation.every=1, not 2,"), (["evaluation=study"], " more, ")):
        caplog.clear()
        assert run(small(*given, *more)) == folder
        assert told in caplog.text and ("is not measured again" in caplog.text) == bool(more)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_as_many_checkpoints_are_kept_as_asked(small):
    one = run(small("method=sft", "trainer.max_steps=7", "callbacks.checkpoint.every=2"))
    assert checkpoints(one) == ["last.ckpt"]
    three = ["method=sft", "trainer.max_steps=7", "callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=3", "study.name=k"]
    assert checkpoints(run(small(*three))) == ["last.ckpt", "step-4.ckpt", "step-6.ckpt"]


def test_a_damaged_checkpoint_is_refused_and_an_older_one_takes_its_place(small):
    options = ["method=sft", "callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=2", "trainer.max_steps=6"]
    folder = run(small(*options))
    last = folder / "checkpoints" / "last.ckpt"
    whole, longer = last.read_bytes(), [*options[:-1], "trainer.max_steps=8"]
    for broken in (whole[: len(whole) // 2], whole[:3000] + bytes(200) + whole[3200:], b""):
        last.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is damaged .*mv .*step-4\.ckpt .*last\.ckpt"):
            run(small(*longer))
    os.replace(folder / "checkpoints" / "step-4.ckpt", last)
    assert run(small(*longer)) == folder
    straight = run(small(*longer, "study.name=straight"))
    assert equal(folder, straight)


def test_a_foreign_checkpoint_is_refused(small, narrow):
    options = ["method=sft", "trainer.max_steps=2"]
    folder, longer = run(small(*options)), ["method=sft", "trainer.max_steps=3"]
    last = folder / "checkpoints" / "last.ckpt"
    foreign = run(small(*options, f"model.path={narrow[0]}", "study.name=f")) / "checkpoints" / "last.ckpt"
    last.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match="is of another model: its student"):
        run(small(*longer))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": 1, "epoch": 0, "loops": {}}, last)
    with pytest.raises(ValueError, match="of another program"):
        run(small(*longer))
    other_seed = run(small(*options, "seed=5")) / "checkpoints" / "last.ckpt"
    last.write_bytes(other_seed.read_bytes())
    with pytest.raises(ValueError, match=r"that of another run \(\w+/seed-5 instead of \w+/seed-0\)"):
        run(small(*longer))


def test_a_flipped_bit_is_refused_with_a_sentence_or_changes_nothing(small):
    last = run(small("method=sft", "trainer.max_steps=1")) / "checkpoints" / "last.ckpt"
    whole, draw = last.read_bytes(), random.Random(0)
    content = torch.load(last, weights_only=True)
    for _ in range(60):
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        last.write_bytes(broken)
        if damage(last) is None:
            assert alike(torch.load(last, weights_only=True)["state_dict"], content["state_dict"])
        else:
            with pytest.raises(ValueError, match="is damaged"):
                check_checkpoint(last)


def rows(folder: Path) -> list[dict]:
    """metrics.csv without times and memory."""
    found = read_csv(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if "seconds" not in k and "second" not in k and "mib" not in k} for row in found]


@pytest.mark.parametrize(
    ("every", "step", "place"),
    [
        (50, 4, HealthChecks),
        pytest.param(2, 4, Checkpoint, marks=pytest.mark.slow),
        pytest.param(2, 5, HealthChecks, marks=pytest.mark.slow),
        pytest.param(1, 1, Checkpoint, marks=pytest.mark.slow),
    ],
)
def test_metrics_are_those_of_an_unbroken_run_wherever_it_broke(small, monkeypatch, every, step, place):
    """Before the first checkpoint, and between a checkpoint and what Lightning does after it."""
    options = ["method=opd", "trainer.max_steps=8", f"callbacks.checkpoint.every={every}", "evaluation.every=3"]
    options += ["callbacks.samples.every=1"]
    real = place.on_train_batch_end

    def dying(self, trainer, module, *rest):
        real(self, trainer, module, *rest)
        if trainer.global_step == step:
            raise RuntimeError("killed")

    monkeypatch.setattr(place, "on_train_batch_end", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(small(*options))
    monkeypatch.undo()
    broken, whole = run(small(*options)), run(small(*options, "study.name=whole"))
    assert [row["step"] for row in rows(broken)] == list(range(9)) and rows(broken) == rows(whole)
    assert read_lines(broken / "samples.jsonl") == read_lines(whole / "samples.jsonl")


def test_files_that_a_crash_has_torn_do_not_keep_a_run_from_going_on(small, caplog):
    options = ["method=opd", "trainer.max_steps=4", "callbacks.checkpoint.every=2", "callbacks.samples.every=1"]
    options += ["evaluation.answers.n=2"]
    folder = run(small(*options))
    for name in ("samples.jsonl", "answers.json", "evaluation.json", "ledger.json", "outcomes.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) * 2 // 3])
    with (folder / "metrics.csv").open("ab") as file:
        file.write(b"4,0.12")
    (folder / "status.json").write_text('{"state": "finished"}')
    longer = [o.replace("steps=4", "steps=6") for o in options]
    assert run(small(*longer)) == folder and "1 torn rows" in caplog.text
    run(small(*options, "study.name=whole"))
    assert rows(folder) == rows(run(small(*longer, "study.name=whole")))
    for damaged in (b"\0\0\0\0", b"", b"4,0.1\n"):
        (folder / "metrics.csv").write_bytes(damaged)
        assert read_csv(folder / "metrics.csv") == []


def test_one_process_at_a_time_makes_a_run(small):
    cfg = small("method=sft")
    folder = run_folder(cfg)
    folder.mkdir(parents=True)
    with locked(folder), pytest.raises(ValueError, match="is being made by another process"):
        run(cfg)
    assert run(cfg) == folder


def equal(first: Path, second: Path) -> bool:
    """Are weights, optimizer, teachers, schedule and evaluation the same bit by bit?"""
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (first, second)]
    same = all(alike(states[0][key], states[1][key]) for key in ("state_dict", "optimizer_states", "lr_schedulers", "teachers"))
    ledgers, ends = (
        [json.loads((f / name).read_text()) for f in (first, second)] for name in ("ledger.json", "evaluation.json")
    )
    costs = all(ledgers[0][key] == ledgers[1][key] for key in ("tokens", "flops", "steps"))
    return same and costs and ends[0]["history"] == ends[1]["history"]


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def start(*arguments: str, **options) -> subprocess.Popen:
    """A run in a session of its own, which is that of all its processes."""
    command = [sys.executable, "-m", "opd_lightning", *arguments]
    options |= {"text": True, "env": ENVIRONMENT, "start_new_session": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def goes_on(*arguments: str) -> None:
    output, _ = (process := start(*arguments)).communicate(timeout=280)
    assert process.returncode == 0, output[-1500:]


def overrides(tiny: str, other: str, out: Path) -> list[str]:
    """Of a run of 40 steps that writes a checkpoint at every second one."""
    given = {"model.path": tiny, "model.teacher": other, "output_dir": out, "trainer.accelerator": "cpu", "logger": "none"}
    given |= {"trainer.max_steps": 40, "data.batch_size": 4, "task.n_train": 16, "task.n_eval": 8, "evaluation.every": 10}
    return [f"{k}={v}" for k, v in given.items()] + ["callbacks.checkpoint.every=2"]


METHODS = {
    "sft": ["method=sft"],
    "opd": ["method=opd"],
    "ema": ["method=sdft", "teacher=ema"],
    "grpo": ["method=grpo", "model=world"],
    "episodes": ["method=grpo", "model=world", "environment=lookup", "evaluation=episodes"],
    "tools": [
        *("method=opd", "environment=tool_use", "environment.tools=tests.test_tools.add", "environment.max_turns=3"),
        *("rollout.sampling.max_new_tokens=40", "evaluation=none"),
    ],
    "lora": ["method=sdft", "teacher=ema", "adapter=lora", "trainer.precision=bf16-mixed"],
    "ddp": ["method=sdft", "teacher=ema", "trainer=ddp", "trainer.devices=2"],
    "ddp_lora": ["method=sdft", "adapter=lora", "trainer.precision=bf16-mixed", "trainer=ddp", "trainer.devices=2"],
}


def steps_in(study: Path) -> int:
    """Rows of the study's only metrics.csv so far, its header among them."""
    files = list(study.glob("*/seed-0/metrics.csv"))
    return len(files[0].read_text().splitlines()) if files else 0


def killed_at_random(tiny, other, tmp_path, name: str, kills: int, seed: int) -> None:
    """SIGKILL at random moments, one of them while a checkpoint is written; what ends equals a run that was never stopped."""
    base = [o for o in overrides(tiny, other, tmp_path) if name not in ("grpo", "episodes") or not o.startswith("model.")]
    draw, folder, hits = random.Random(f"{name} {seed}"), tmp_path / "killed", 0
    for kill in range(kills):
        process, deadline = start(*base, *METHODS[name], "study.name=killed"), time.time() + 120
        target = draw.randrange(38)

        while process.poll() is None and time.time() < deadline:
            written = list(folder.glob("*/seed-0/checkpoints/next.ckpt"))
            if written if kill % 2 else steps_in(folder) > target:
                break
            time.sleep(0.0005 if kill % 2 else 0.01)
        hits += process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    for study in ("killed", "whole"):
        line = [*base, *METHODS[name], f"study.name={study}"]
        goes_on(*line) if "trainer=ddp" in line else run(compose(line))
    (first,), (second,) = folder.glob("*/seed-0"), (tmp_path / "whole").glob("*/seed-0")
    assert equal(first, second) and rows(first) == rows(second) and hits == kills


def test_a_run_that_is_killed_ends_bit_by_bit_like_one_that_is_not(tiny, other, tmp_path):
    killed_at_random(tiny, other, tmp_path, "ema", kills=1, seed=1)


@pytest.mark.slow
def test_runs_with_tools_that_are_killed_end_like_one_that_is_not(tmp_path):
    """The student writes calls by chance, most of which are answered with errors; weights are equal bit by bit."""
    paths = [save_chat_model(tmp_path / name, seed) for seed, name in enumerate(("student", "teacher"))]
    killed_at_random(*paths, tmp_path, "tools", kills=3, seed=2)
    (file,) = tmp_path.glob("whole/*/seed-0/metrics.csv")
    assert sum(row["rollout/tool_calls"] for row in read_csv(file)[1:]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "tools"])
def test_runs_that_are_killed_again_and_again_end_like_ones_that_are_not(tiny, other, tmp_path, name):
    killed_at_random(tiny, other, tmp_path, name, kills=5, seed=2)


def test_a_run_that_dies_in_its_last_evaluation_is_completed(small, monkeypatch):
    """Its last step is no checkpoint before its numbers are there."""
    options = ["method=opd", "evaluation=study", "trainer.max_steps=4", "callbacks.checkpoint.every=2", "evaluation.every=2"]
    real, calls = Robustness.__call__, []

    def dying(self, student, teachers, generator):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(self, student, teachers, generator)

    monkeypatch.setattr(Robustness, "__call__", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(small(*options))
    folder = run(small(*options))
    assert "robust/mean" in json.loads((folder / "evaluation.json").read_text())["end"]
    assert (folder / "ledger.json").is_file() and (folder / "outcomes.json").is_file()
    assert equal(folder, run(small(*options, "study.name=whole")))


def test_a_signal_in_the_last_evaluation_is_honoured_after_it(small, monkeypatch):
    """The run is finished, and nothing else is begun."""
    real, calls = Robustness.__call__, []

    def asked(self, student, teachers, generator):
        calls.append(1)
        if len(calls) == 2:  # after training
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, student, teachers, generator)

    monkeypatch.setattr(Robustness, "__call__", asked)
    cfg = small("method=opd", "evaluation=study", "trainer.max_steps=2", "evaluation.every=9")
    with pytest.raises(Stopped) as stop:
        run(cfg)
    assert stop.value.code == 143
    cells = list(Path(cfg.output_dir).glob("*/*/seed-0/status.json"))
    assert json.loads(cells[0].read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_saves_and_has_its_own_exit_code(tiny, other, tmp_path, number, code):
    base = overrides(tiny, other, tmp_path)
    process, deadline = start(*base, "trainer.max_steps=100000", "study.name=s"), time.time() + 120
    while not list(tmp_path.glob("s/*/seed-0/checkpoints/last.ckpt")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(tiny, other, tmp_path):
    """No file may grow beyond 40 kB: the first checkpoint cannot be written."""
    base = overrides(tiny, other, tmp_path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    process = start(*base, "study.name=full", preexec_fn=limit)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output and "could not be written" in output, output[-1500:]
    goes_on(*base, "study.name=full")


def without_override() -> None:
    """Called in a new process: permissions hold for it even if it is root's (drops CAP_DAC_OVERRIDE and _READ_SEARCH)."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_is_one_sentence_and_the_run_goes_on(tiny, other, tmp_path):
    base = [*overrides(tiny, other, tmp_path), "trainer.max_steps=200"]
    process = start(*base, "study.name=closed", preexec_fn=without_override)
    folder = checkpointed(tmp_path / "closed")
    for path in (folder / "checkpoints", folder):
        path.chmod(0o555)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output and "at its permissions" in output, output[-1500:]
    process = start(*base, "study.name=closed", preexec_fn=without_override)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output and "at its permissions" in output, output[-1500:]
    for path in (folder, folder / "checkpoints"):
        path.chmod(0o755)
    for study in ("closed", "whole"):
        goes_on(*base, f"study.name={study}")
    assert equal(folder, checkpointed(tmp_path / "whole"))


def checkpointed(study: Path) -> Path:
    """The folder of a study's only run, as soon as it has a checkpoint."""
    deadline = time.time() + 120
    while not (found := list(study.glob("*/seed-0/checkpoints/last.ckpt"))) and time.time() < deadline:
        time.sleep(0.02)
    return found[0].parents[1]


@pytest.mark.slow
def test_a_dead_service_of_wandb_is_one_sentence_and_the_run_goes_on(tiny, other, tmp_path):
    base = [o for o in overrides(tiny, other, tmp_path) if not o.startswith("logger=")]
    base += ["logger=wandb", "trainer.max_steps=200"]
    process = start(*base, "study.name=dead")
    folder = checkpointed(tmp_path / "dead")
    services = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    assert services.stdout.split()
    for service in services.stdout.split():
        os.kill(int(service), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output and "W&B does not answer" in output, output[-1500:]
    for study in ("dead", "whole"):
        goes_on(*base, f"study.name={study}")
    assert equal(folder, checkpointed(tmp_path / "whole"))


@pytest.mark.slow
def test_a_dead_device_is_one_sentence_and_the_run_goes_on(tiny, other, tmp_path):
    """The second of two processes is killed; the first says so, and the same command ends like an unbroken run."""
    base = [*overrides(tiny, other, tmp_path), "trainer=ddp", "trainer.devices=2", "trainer.max_steps=60", "evaluation=none"]
    process, deadline = start(*base, "study.name=dead"), time.time() + 120
    while not list(tmp_path.glob("dead/*/seed-0/checkpoints/last.ckpt")) and time.time() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
    assert children
    for child in children:
        command = Path(f"/proc/{child}/cmdline").read_bytes().decode()
        if "opd_lightning" in command:
            os.kill(int(child), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in output, output[-1500:]
    assert (
        "terminated with code -9" in output or "another process of this run is gone" in output
    )  # Lightning's sentence or ours
    for study in ("dead", "whole"):
        goes_on(*base, f"study.name={study}")
    (first,), (second,) = (list((tmp_path / name).glob("*/seed-0")) for name in ("dead", "whole"))
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (first, second)]
    assert all(alike(states[0][key], states[1][key]) for key in ("state_dict", "optimizer_states"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "Make room"),
        (PermissionError(13, "Permission denied"), "at its permissions"),
        (
            RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file"),
            "could not be written",
        ),
        (RuntimeError("inline_container.cc:747] . open file failed with strerror: Permission denied"), "at its permissions"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "another process of this run is gone"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "memory ran out"),
    ],
)
def test_what_the_world_does_is_told_in_one_sentence(error, told):
    assert told in errors.explain(error) and "the same command goes on" in errors.explain(error)
    assert errors.explain(RuntimeError("shapes do not match")) is None


@pytest.mark.slow
def test_the_package_imports_without_what_only_unix_has():
    """As on Windows: neither fcntl nor resource, no SIGALRM, no killpg."""
    code = (
        "import pkgutil, sys, os, signal, torch, lightning, transformers, peft, wandb, filelock, psutil\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "del os.killpg, os.sysconf, signal.SIGALRM, signal.SIGUSR1, signal.setitimer\n"
        "import opd_lightning\n"
        "names = [m.name for m in pkgutil.walk_packages(opd_lightning.__path__, 'opd_lightning.')]\n"
        "[__import__(name) for name in names if not name.endswith('__main__') and '.plugins.' not in name]\n"
        "print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout.splitlines()[-1]) > 90, done.stderr
