"""Safe by default: secrets stay out of files, foreign code does not run, nothing is written outside the run's folder."""

import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch

from opd_lightning.study import main as report
from opd_lightning.tasks.sandbox import Code
from opd_lightning.training.run import run
from opd_lightning.utils.secrets import MASK, is_secret, redact_secrets

KEY, TOKEN = "k" * 20 + "0123456789" * 2, "hf_abcdefghijklmnop"


def everything(folder: Path) -> str:
    """The bytes of all files below a folder."""
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


def test_no_secret_reaches_a_file_or_the_screen(command, monkeypatch, tmp_path):
    """W&B's key and the hub's token are in the environment, and one is in the configuration by reference."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    given = [
        "logger=wandb",
        "+logger.settings.api_key=${oc.env:WANDB_API_KEY}",
        "+model.template_options.note=by ${oc.env:HF_TOKEN}",
    ]
    small = ["trainer.max_steps=2", "task.n_train=16", "task.n_eval=8", "method=sft"]
    for more in ([], ["-m", "seed=0,1"]):
        code, output, _ = command(*given, *small, *more)
        assert code == 0 and KEY not in output and TOKEN not in output, output
    assert command(str(tmp_path / "out" / "default"), main=report, defaults=False)[0] == 0
    text = everything(tmp_path)
    assert KEY not in text and TOKEN not in text and f"api_key: {MASK}" in text and f"by {MASK}" in text


def test_a_secret_on_the_command_line_is_refused_before_anything_is_written(command, tmp_path):
    code, output, files = command("logger=wandb", f"+logger.settings.api_key={KEY}")
    assert code == 1 and "WANDB_API_KEY" in output and KEY not in output and not files and not (tmp_path / "out").exists()
    for nested in (
        f"+logger.settings={{api_key: {KEY}}}",
        f"+hydra.job.env_set={{HF_TOKEN: {KEY}}}",
        f"+a=[{{b: {{password: {KEY}}}}}]",
    ):
        code, output, files = command("logger=wandb", nested)
        assert code == 1 and "on the command line" in output and KEY not in output and not files


def test_what_is_a_secret(monkeypatch):
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "logger.settings.api_key",
        "token",
        "password",
        "AWS_SECRET_ACCESS_KEY",
        "hub_token",
        "GH_TOKEN",
        "MY_PAT",
    ):
        assert is_secret(name), name
    for name in (
        "max_tokens_per_microbatch",
        "budget.student_tokens",
        "eos_token",
        "model.end_token",
        "loss.aggregate.token_mean",
        "tokenizer",
        "key",
        "keep",
    ):
        assert not is_secret(name), name
    monkeypatch.setenv("SOME_API_KEY", "abcdefghij")
    given = {"a": ["x abcdefghij y", {"password": "p", "n": 3}], "token": None}
    assert redact_secrets(given) == {"a": [f"x {MASK} y", {"password": MASK, "n": 3}], "token": None}


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_model_folder_with_code_or_pickles_runs_neither(small, tiny, tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "evil"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    foreign = config | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match=r"model\.path=.*evil"):
        run(small(f"model.path={folder}"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.path=.*evil"):
        run(small(f"model.path={folder}", "study.name=second"))
    assert not mark.exists()


def test_a_checkpoint_with_a_pickle_in_it_is_refused(small, tmp_path):
    mark = tmp_path / "ran"
    last = run(small("method=sft")) / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": {}, "evil": Evil(mark)}, last)
    with pytest.raises(ValueError, match="checkpoint"):
        run(small("method=sft", "trainer.max_steps=3"))
    last.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match="damaged"):
        run(small("method=sft", "trainer.max_steps=3"))
    assert not mark.exists()


def test_names_in_rows_and_options_stay_inside_the_output_folder(small, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"id": f"../../../evil-{i}", "prompt": f"copy {i}", "completion": "<script>alert(1)</script>"} for i in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    before = set(tmp_path.rglob("*"))
    columns = "task.columns={prompt: prompt, completion: completion, id: id}"
    run(
        small(
            "~task.n_train", "~task.n_eval", "task=table", f"task.path={data}", columns, "method=sft", "task.max_new_tokens=12"
        )
    )
    new = set(tmp_path.rglob("*")) - before
    assert new and all(path.is_relative_to(tmp_path / "out") for path in new)
    for option in ("name=../evil", "study.name=../evil", "study.name=..", "name=a/b"):
        with pytest.raises(ValueError, match="names a folder"):
            run(small(option))


def test_a_report_escapes_what_it_shows(command, tmp_path):
    """A text of the user's in the configuration; model output is not in the report at all."""
    small = ["trainer.max_steps=2", "task.n_train=16", "task.n_eval=8"]
    assert (
        command(*small, "method=sft", "+model.template_options.note='<script>alert(1)</script>'", "seed=0", "study.name=s")[0]
        == 0
    )
    assert command(str(tmp_path / "out" / "s"), main=report, defaults=False)[0] == 0
    page = (tmp_path / "out" / "s" / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page


TESTS = "assert twice(2) == 4\nassert twice(-1) == -2"


@pytest.mark.parametrize(
    ("completion", "content", "feedback"),
    [
        ("Here:\n```python\ndef twice(x):\n    return 2 * x\n```\nDone.", 1.0, None),
        ("def twice(x): return 2 * x", 1.0, None),
        ("```python\ndef twice(x):\n    return x + 2\n```", 0.0, "AssertionError"),
        ("```python\ndef twice(x)\n```", 0.0, "SyntaxError: expected ':'"),
        ("```python\nimport sys\nsys.exit(0)\n```", 0.0, "it was stopped before its end"),
        ("```python\nwhile True: pass\n```", 0.0, "it was stopped before its end"),
        ("```python\nx = bytearray(2**31)\n```", 0.0, "MemoryError"),
        ("```python\nopen('/proc/self/cwd/big', 'wb').write(bytes(2**22))\n```", 0.0, "OSError: [Errno 27] File too large"),
        (
            "```python\nimport os\nassert 'WANDB_API_KEY' not in os.environ, 'leak'\n```",
            0.0,
            "NameError: name 'twice' is not defined",
        ),
        (
            "```python\nimport os\nraise Exception(open(f'/proc/{os.getppid()}/environ').read())\n```",
            0.0,
            "Exception",
        ),
        ("no code \udcff", 0.0, "SyntaxError: invalid syntax"),
    ],
)
def test_code_is_judged_in_a_process_with_limits(completion, content, feedback, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    begun = time.monotonic()
    verdict = Code(seconds=1.0)(completion, TESTS)
    assert (verdict.content, verdict.format) == (content, float("```" in completion)) and time.monotonic() - begun < 3
    assert KEY not in str(verdict.feedback)
    assert verdict.feedback == feedback or (feedback and feedback in str(verdict.feedback))


def test_a_program_takes_what_it_started_with_it(tmp_path):
    mark = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntwice = lambda x: 2 * x"
    assert Code(seconds=1.0)(code, TESTS).content == 1.0
    time.sleep(2)
    assert not mark.exists()


def test_limits_are_checked():
    with pytest.raises(ValueError, match="memory_mib=0 is too little"):
        Code(memory_mib=0)
