"""Start-up: what needs no torch imports none, and what takes time is said."""

import inspect
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import SchedulerType

from opd_lightning.config import CONF_DIR
from opd_lightning.config.names import find
from opd_lightning.config.schema import check_type
from opd_lightning.config.signatures import signature
from opd_lightning.config.values import SCHEDULES, SIZES
from opd_lightning.preflight.devices import devices
from opd_lightning.training.run import run

LINES = {
    "help": ("", ["--help"], 0, "teacher=cached"),
    "help of a key": ("", ["--help", "optim.lr"], 0, "peak learning rate"),
    "help of check": (".check", ["--help"], 0, "--fast"),
    "help of evaluate": (".evaluate", ["-h"], 0, "run=FOLDER"),
    "help of export": (".export", ["--help"], 0, "safetensors"),
    "help of study": (".study", ["--help"], 0, "--against"),
    "help of dashboard": (".dashboard", ["--help"], 0, "ENTITY/PROJECT"),
    "key": ("", ["lrr=1"], 1, "did you mean optim.lr?"),
    "option": ("", ["method=sff"], 1, "did you mean sft?"),
    "argument of Lightning's": ("", ["trainer.profilr=simple"], 1, "did you mean +trainer.profiler?"),
    "type": ("", ["optim.lr=abc"], 1, "optim.lr='abc' should be float"),
    "number": ("", ["trainer.precision=16"], 1, "use bf16-mixed"),
    "refused": ("", ["+trainer.accumulate_grad_batches=4"], 1, "max_tokens_per_microbatch"),
    "folder to make": (
        "",
        ["model=smollm2", "task=instructions"],
        1,
        "opd_lightning.models.smollm2 models/smollm2-135m-instruct` makes it",
    ),
    "check": (".check", ["trainer.max_steps=0"], 1, "must be at least 1"),
    "evaluate": (".evaluate", ["+data.size=3"], 1, "data.size=3 is no key"),
    "configuration": ("", ["--cfg", "job"], 0, "lr: 0.0002"),
}
"""Module, arguments, exit code and a part of what is printed."""

PROGRAM = """
import contextlib, io, json, runpy, sys
from hydra.core.global_hydra import GlobalHydra

told = {}
for name, (module, arguments, _, _) in json.loads(sys.argv[1]).items():
    sys.argv[1:] = arguments
    GlobalHydra.instance().clear()
    code, out = 0, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_module(f"opd_lightning{module}", run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print("" if isinstance(stop.code, int) or stop.code is None else stop.code)
    told[name] = (int(code), out.getvalue(), sorted({"torch", "lightning", "transformers"} & set(sys.modules)))
print(json.dumps(told))
"""


def test_help_and_wrong_words_are_answered_without_importing_torch(tmp_path):
    """All in one process, which would keep what one of them imports."""
    call = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(LINES)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        call, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"COLUMNS": "80", "PYTHONPATH": path}, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    for name, (_, _, code, sentence) in LINES.items():
        found, output, imported = told[name]
        assert (found, imported) == (code, []), f"{name}: {output}"
        assert " ".join(sentence.split()) in re.sub(r"[\s│]+", " ", output), f"{name}: {output}"
        if name.startswith("help"):
            assert max(map(len, output.splitlines())) <= 80, name


def probes(annotation) -> list[bool]:
    """Which values an annotation takes."""
    taken = []
    for value in (None, 1, 1.5, True, "a", [1], {"a": 1}):
        try:
            check_type("x", value, annotation)
        except ValueError:
            taken.append(False)
        else:
            taken.append(True)
    return taken


def test_signatures_read_from_source_are_those_of_the_imported_objects():
    """Of every target of the shipped options: names, kinds, which have defaults, and which values they take."""
    files = [path.read_text() for path in Path(CONF_DIR).rglob("*.yaml")]
    targets = sorted({name for text in files for name in re.findall(r"_target_: *([\w.]+)", text)})
    read = {target: signature(target) for target in targets}
    assert len([target for target in targets if read[target] is not None]) > 80
    for target, parameters in read.items():
        if parameters is None:  # it is imported to be checked
            assert target.split(".")[0] in ("wandb", "experiments", "my_package")
            continue
        found = find(target)
        made = inspect.isclass(found) and "__new__" in vars(found) and "__init__" in vars(found)  # chooses a subclass alone
        real = dict(inspect.signature(found.__init__ if made else found).parameters)
        real.pop("self", None)
        assert list(parameters) == list(real), target
        for name, parameter in parameters.items():
            assert parameter.kind == real[name].kind, f"{target}({name})"
            assert (parameter.default is parameter.empty) == (real[name].default is real[name].empty), f"{target}({name})"
            assert probes(parameter.annotation) == probes(real[name].annotation), f"{target}({name})"


def test_the_names_that_are_known_without_torch_are_those_of_the_libraries():
    assert set(SCHEDULES) <= {schedule.value for schedule in SchedulerType}
    assert {name: getattr(torch, name).itemsize for name in SIZES} == SIZES


@pytest.mark.slow
def test_a_run_says_what_it_is_doing_before_its_first_update(small, caplog):
    caplog.set_level(logging.INFO, "opd_lightning")
    run(small("method=sft", "trainer.max_steps=1"))
    told = [record.message for record in caplog.records if record.message.endswith("...")]
    assert told == [
        "reading the data, and rendering its prompts ...",
        "loading the weights; an evaluation comes before the first update ...",
    ]


@pytest.mark.parametrize(
    ("gpus", "accelerator", "asked", "driver", "sentence"),
    [
        (1, "cpu", 1, True, "trainer.accelerator=cpu leaves a GPU unused"),
        (4, "auto", 1, True, "uses one of 4 GPUs; trainer=ddp trainer.devices=4"),
        (0, "auto", 1, True, "the run uses the CPU: torch"),
        (1, "auto", 1, True, None),
        (0, "auto", 1, False, None),
        (0, "cpu", 1, True, None),
    ],
)
def test_a_gpu_that_is_left_unused_is_said(monkeypatch, gpus, accelerator, asked, driver, sentence):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    found = list(devices(OmegaConf.create({"trainer": {"accelerator": accelerator, "devices": asked}})))
    assert [finding.state for finding in found] == (["warn"] if sentence else [])
    assert sentence is None or sentence in found[0].text
