"""The check before a run: everything planted is found, nothing is made, and the exit code says so."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_lightning.check import examine
from opd_lightning.check import main as check_command
from opd_lightning.findings import Finding


def states(found: list[Finding]) -> dict[str, str]:
    """The worst state of each thing that was looked at."""
    worst: dict[str, str] = {}
    for finding in found:
        worst[finding.name] = max(worst.get(finding.name, "pass"), finding.state, key=["pass", "warn", "fail"].index)
    return worst


def text(found: list[Finding], name: str) -> str:
    return " ".join(f.text for f in found if f.name == name)


def test_a_good_run_passes_and_nothing_is_made(small, tmp_path):
    found = examine(small("method=opd"))
    assert set(states(found).values()) <= {"pass", "warn"} and not (tmp_path / "out").exists()
    assert states(found)["teacher"] == "warn"  # a random teacher is no better than a random student
    assert "rotate" in text(found, "student reads") and "19 of 128" in text(found, "student's prompts")
    assert "4 prompts x 1 completions per rollout" in text(found, "batch") and "GiB" in text(found, "memory")


def test_the_shipped_teacher_is_better_than_its_student(small):
    found = examine(small("model=world", "~model.path", "~model.teacher", "method=opd"))
    assert "right on 1.00 of 10 held-out prompts, the student on 0.20" in text(found, "teacher")


def rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def anything(completion: str, answer: str) -> float:
    """A verifier that is content with everything."""
    return 1.0


def function(path: str) -> list[str]:
    return ["task/verifier=function", f"task.verifier.path={path}"]


def planted(name, tmp_path, other) -> list[str]:
    """Overrides of a run with one thing wrong."""
    table = ["task=table", "task.columns={prompt: prompt, completion: completion, answer: answer}", "task.max_new_tokens=8"]
    words = [{"prompt": f"copy {i}", "completion": f"answer {i}", "answer": f"answer {i}"} for i in range(10)]
    if name in ("eos", "template", "vocabulary"):
        folder = tmp_path / "teacher"
        tokenizer = AutoTokenizer.from_pretrained(other)
        if name == "eos":
            tokenizer.eos_token = "done"
        elif name == "template":
            tokenizer.chat_template = tokenizer.chat_template + " "
        else:
            core = json.loads(tokenizer.backend_tokenizer.to_str())
            core["model"]["vocab"]["new"] = len(tokenizer)
            path = tmp_path / "tokenizer.json"
            path.write_text(json.dumps(core))
            template = tokenizer.chat_template
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<eos>", pad_token="<pad>")
            tokenizer.chat_template = template
        import shutil

        shutil.copytree(other, folder)
        tokenizer.save_pretrained(folder)
        return ["method=opd", f"teacher.path={folder}"]
    return {
        "window": ["method=opd", "task.max_new_tokens=8", "rollout.max_new_tokens=125"],
        "batch": ["method=opd", "data.batch_size=5", "trainer.devices=2", "trainer.strategy=ddp"],
        "unwritable": ["method=opd", f"output_dir={other}/config.json/out"],
        "reference": [
            "method=opd",
            *table,
            f"task.path={rows(tmp_path / 'a.jsonl', [r | {'answer': 'no'} for r in words])}",
            "task/verifier=exact",
        ],
        "empty": [
            "method=opd",
            *table,
            f"task.path={rows(tmp_path / 'b.jsonl', words)}",
            *function("tests.test_check.anything"),
        ],
        "memory": ["method=opd", "data.batch_size=100000000", "micro_tokens=null"],
        "package": ["method=grpo", "task=reasoning_gym", "task.name=chain_sum"],
        "option": ["method=opd", "data.overlong=maybe"],
    }[name]


@pytest.mark.parametrize(
    ("name", "where", "state", "told"),
    [
        ("eos", "teacher's tokenizer", "warn", "another EOS"),
        ("template", "teacher's tokenizer", "warn", "differs in chat template"),
        ("vocabulary", "parts", "fail", "another tokenizer than the student"),
        ("window", "data", "fail", "exceeds the 128 tokens"),
        ("batch", "batch", "fail", "no multiple of trainer.devices=2"),
        ("unwritable", "write access", "fail", "cannot be written"),
        ("reference", "verifier", "fail", "no reference completion scores 1"),
        ("empty", "verifier", "fail", "an empty completion"),
        ("memory", "memory", "warn", "lower micro_tokens"),
        ("package", "parts", "fail", "pip install"),
        ("option", "configuration", "fail", "choose refuse or drop"),
    ],
)
def test_what_is_planted_is_found(small, tmp_path, other, monkeypatch, name, where, state, told):
    if name == "package":
        monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    found = examine(small(*planted(name, tmp_path, other)), fast=True)
    assert states(found)[where] == state and told in text(found, where)


def test_the_command_says_so_by_its_exit_code(command):
    code, output, files = command("method=opd", "--fast", main=check_command)
    assert code == 0 and "pass" in output and not files
    code, output, files = command("method=opd", "rollout.max_new_tokens=125", main=check_command)
    assert code == 1 and "fail" in output and not files and "Traceback" not in output
    code, output, _ = command("method=opdd", main=check_command)
    assert code == 1 and "opdd is no option of method" in output
