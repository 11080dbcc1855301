"""The check before a run: everything planted is found, nothing is made, and the exit code says so."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_lightning.check import examine
from opd_lightning.check import main as check_command
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.examine import said_once
from opd_lightning.runs.identity import run_folder
from opd_lightning.training.run import run


def states(found: list[CheckResult]) -> dict[str, str]:
    """The worst state of each thing that was looked at."""
    worst: dict[str, str] = {}
    for result in found:
        worst[result.name] = max(worst.get(result.name, "pass"), result.state, key=["pass", "warn", "fail"].index)
    return worst


def text(found: list[CheckResult], name: str) -> str:
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
    folder = tmp_path / "teacher"
    if name in ("padded", "short", "short_teacher"):
        shutil.copytree(other, folder)
        config = json.loads((folder / "config.json").read_text())
        config["vocab_size"] += 8 if name == "padded" else -8
        (folder / "config.json").write_text(json.dumps(config))
        return ["method=opd", f"{'teacher' if name == 'short_teacher' else 'model'}.path={folder}"]
    if name == "unrendered":
        (tmp_path / "strict.jinja").write_text("{{ raise_exception('speaks to nobody') }}")
        return ["method=opd", f"model.chat_template={tmp_path}/strict.jinja"]
    if name in ("eos", "template", "special", "vocabulary"):
        tokenizer = AutoTokenizer.from_pretrained(other)
        if name == "eos":
            tokenizer.eos_token = "done"
        elif name == "special":
            tokenizer.add_special_tokens({"cls_token": "done"})
        elif name == "template":
            tokenizer.chat_template = tokenizer.chat_template + " "
        else:
            core = json.loads(tokenizer.backend_tokenizer.to_str())
            core["model"]["vocab"]["scarlet"] = core["model"]["vocab"].pop("red")
            path = tmp_path / "tokenizer.json"
            path.write_text(json.dumps(core))
            template = tokenizer.chat_template
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<eos>", pad_token="<pad>")
            tokenizer.chat_template = template
        shutil.copytree(other, folder)
        tokenizer.save_pretrained(folder)
        return ["method=opd", f"teacher.path={folder}"]
    return {
        "window": ["method=opd", "task.max_new_tokens=8", "rollout.sampling.max_new_tokens=125"],
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
        "too_large": ["method=opd"],
        "full_disk": ["method=opd"],
        "accelerator": ["method=sft", "trainer.accelerator=gpu"],
        "precision": ["method=sft", "trainer.precision=fp7"],
        "devices": ["method=sft", "trainer.devices=0"],
        "strategy": ["method=sft", "trainer.strategy=nope"],
        "memory": ["method=opd", "data.batch_size=100000000", "max_tokens_per_microbatch=null"],
        "package": ["method=grpo", "task=reasoning_gym", "task.name=chain_sum"],
        "option": ["method=opd", "data.overlong=maybe"],
    }[name]


@pytest.mark.parametrize(
    ("name", "where", "state", "told"),
    [
        ("eos", "teacher's tokenizer", "warn", "another EOS"),
        ("template", "teacher's tokenizer", "warn", "differs in chat template"),
        ("special", "teacher's tokenizer", "warn", "differs in special tokens"),
        ("padded", "tokenizer", "pass", "32 tokens, padded to 40"),
        ("short", "tokenizer", "fail", "32 tokens, and the model has 24"),
        ("short_teacher", "teacher's tokenizer", "fail", "24 logits"),
        ("unrendered", "data", "fail", "speaks to nobody"),
        ("too_large", "memory", "fail", "weights, gradients and optimizer alone take"),
        ("full_disk", "disk", "warn", "make room, or choose another output_dir"),
        ("accelerator", "trainer", "fail", "trainer cannot be made of its options"),
        ("precision", "trainer", "fail", "Precision 'fp7' is invalid"),
        ("devices", "trainer", "fail", "devices=0"),
        ("strategy", "trainer", "fail", "invalid strategy name"),
        ("vocabulary", "teacher's tokenizer", "warn", "another tokenizer (SharedVocabulary): 31 of the student's 32 tokens"),
        ("window", "data", "fail", "exceeds the 128 tokens"),
        ("batch", "batch", "fail", "no multiple of trainer.devices=2"),
        ("unwritable", "write access", "fail", "cannot be written"),
        ("reference", "verifier", "fail", "no reference completion scores 1"),
        ("empty", "verifier", "fail", "an empty completion"),
        ("memory", "memory", "warn", "lower max_tokens_per_microbatch"),
        ("package", "parts", "fail", "pip install"),
        ("option", "configuration", "fail", "choose refuse or drop"),
    ],
)
def test_what_is_planted_is_found(small, tmp_path, other, monkeypatch, name, where, state, told):
    if name == "package":
        monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    elif name == "too_large":
        monkeypatch.setattr("opd_lightning.preflight.resources.device", lambda cfg: ("GPU", 1000))
    elif name == "full_disk":
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    elif name == "accelerator":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = examine(small(*planted(name, tmp_path, other)), fast=True)
    assert states(found)[where] == state and told in text(found, where)


@pytest.mark.parametrize(
    ("name", "told"),
    [("reference", "verifier: no reference completion scores 1"), ("short", "tokenizer: .* the model has 24")],
)
def test_training_refuses_what_the_check_fails(small, tmp_path, other, name, told):
    """It looks at all that is cheap to look at, before weights are loaded."""
    cfg = small(*planted(name, tmp_path, other), "method=grpo")
    with pytest.raises(ValueError, match=told):
        run(cfg)
    assert '"failed"' in (run_folder(cfg) / "status.json").read_text()


def test_training_warns_of_what_the_check_warns_of(small, tmp_path, other, caplog):
    with caplog.at_level(logging.WARNING):
        run(small(*planted("eos", tmp_path, other)))
    assert "warning: teacher's tokenizer: " in caplog.text and "another EOS" in caplog.text


def test_a_run_whose_trainer_cannot_be_made_says_so_in_a_sentence(small):
    with pytest.raises(ValueError, match=r"^trainer cannot be made of its options \(Precision 'fp7' is invalid"):
        run(small("method=sft", "trainer.precision=fp7"))


def test_a_failure_is_told_once():
    first = CheckResult("data", "fail", "example 3: the template refuses it. task.bad_rows=skip leaves such rows out (2 here).")
    same, other = CheckResult("memory", "fail", "the template refuses it."), CheckResult("disk", "fail", "full")
    assert said_once(same, [first]) == CheckResult("memory", "fail", "not checked, because of what is said of data")
    assert said_once(other, [first]) is other
    assert said_once(passed := CheckResult("data", "pass", "example 3"), [first]) is passed


def test_the_command_shows_no_secret(command, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    code, output, _ = command("method=sft", "model.path=/nowhere/0123456789abcdef", "--fast", main=check_command)
    assert code == 1 and "(secret)" in output and "0123456789abcdef" not in output
    code, output, _ = command("method=0123456789abcdef", main=check_command)
    assert code == 1 and "(secret)" in output and "0123456789abcdef" not in output


def test_the_command_says_so_by_its_exit_code(command):
    code, output, files = command("method=opd", "--fast", main=check_command)
    assert code == 0 and "pass" in output and not files
    code, output, files = command("method=opd", "rollout.sampling.max_new_tokens=125", main=check_command)
    assert code == 1 and "fail" in output and not files and "Traceback" not in output
    code, output, _ = command("method=opdd", main=check_command)
    assert code == 1 and "opdd is no option of method" in output
