"""Misuse from Python: what would be left out, ignored or overwritten in silence is said, or refused with a remedy."""

import json
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import Distillation
from opd_lightning.config.trainer_arguments import check_optimization, ignored
from opd_lightning.preflight.checks import rows
from opd_lightning.preflight.rendering import left_rows
from opd_lightning.tasks.table import TableTask
from opd_lightning.training.arguments import Models
from opd_lightning.utils.in_memory import in_python
from opd_lightning.utils.vocabulary import ValidIds

PROMPTS = [f"swap {' '.join(f'{i:05}')}" for i in range(40)]
ROWS = [{"prompt": prompt, "completion": f"answer {prompt[5:]}"} for prompt in PROMPTS]
SMALL = {"task.max_new_tokens": 6, "data.batch_size": 4, "task.n_eval": 4}


def trainer(**arguments) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "max_steps": 1, **quiet, **arguments})


class Parts:
    """`Components` as far as `left_rows` reads them."""

    def __init__(self, task):
        self.task = task


def file_of(folder, name, prompts) -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps({"prompt": prompt, "completion": str(i)}) for i, prompt in enumerate(prompts)))
    return str(path)


def warned(task) -> list[str]:
    return [result.text for result in left_rows(Parts(task)) if result.state == "warn"]


def test_repeated_prompts_are_said(tmp_path):
    task = TableTask(file_of(tmp_path, "rows.jsonl", [f"question {i // 10}" for i in range(100)]), {})
    said = "90 of 100 rows repeat a prompt, up to case and blanks, and are left out: one row of each prompt is kept."
    assert warned(task) == [said] == task.notes["warnings"]
    few = TableTask(file_of(tmp_path, "few.jsonl", [f"question {i}" for i in range(100)] + ["Question  1"]), {})
    assert few.notes["repeated_prompts"] == 1 and warned(few) == []


def test_rows_of_heldout_prompts_are_said(tmp_path):
    path = file_of(tmp_path, "rows.jsonl", [f"question {i}" for i in range(10)])
    heldout = file_of(tmp_path, "heldout.jsonl", ["question 1", "question 1", "question 2"])
    said = warned(TableTask(path, {}, heldout={"path": heldout}))
    assert [text.split(" repeat")[0] for text in said] == ["1 of 3 held-out rows", "2 of 10 rows"]
    assert said[1].endswith("one row of each prompt is kept, and none of a held-out prompt.")


def test_rows_that_are_all_held_out(tmp_path):
    path = file_of(tmp_path, "rows.jsonl", [f"question {i}" for i in range(10)])
    with pytest.raises(ValueError, match=r"all 10 rows of task.path=.* have prompts that task.heldout.path=.* holds out"):
        TableTask(path, {}, heldout={"path": path})
    most = file_of(tmp_path, "most.jsonl", [f"question {i}" for i in range(9)])
    with pytest.raises(ValueError, match=r"1 distinct prompt beside those of task\.heldout\.path"):
        TableTask(path, {}, heldout={"path": most})


def test_arguments_that_lightning_refuses_without_a_remedy():
    check_optimization({"accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None})
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 .* max_tokens_per_microbatch"):
        check_optimization({"accumulate_grad_batches": 2})


@pytest.mark.slow
def test_a_trainer_that_accumulates_or_clips(tiny):
    d = Distillation("sft", tiny, ROWS, overrides=SMALL)
    remedies = {"accumulate_grad_batches": (2, "max_tokens_per_microbatch"), "gradient_clip_val": (1.0, r"optim\.clip_norm")}
    for name, (value, remedy) in remedies.items():
        with pytest.raises(ValueError, match=f"{name}={value} .* {remedy}"):
            d.trainer(**{name: value})
        with pytest.raises(ValueError, match=f"{name}={value} .* {remedy}"):
            trainer(**{name: value}).fit(d.module, d.data)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=.* max_tokens_per_microbatch"):
        trainer(callbacks=[GradientAccumulationScheduler({1: 2})]).fit(d.module, d.data)


@pytest.mark.slow
def test_a_second_fit_keeps_the_results(tiny):
    d, fitted = Distillation("sft", tiny, ROWS, overrides=SMALL), trainer()
    fitted.fit(d.module, d.data)
    end = d.results.end
    for again in (fitted, trainer(accumulate_grad_batches=2)):
        with pytest.raises(ValueError, match=r"max_steps=1: fit would train nothing; make a new one|max_tokens_per_micro"):
            again.fit(d.module, d.data)
        assert d.results.end == end
    trainer(max_steps=2).fit(d.module, d.data)
    assert d.results.end["step"] == 2


@pytest.mark.slow
def test_module_and_data_of_two_objects(tiny):
    a, b = (Distillation("sft", tiny, ROWS, overrides=SMALL) for _ in range(2))
    with pytest.raises(ValueError, match="the module and the data of two objects"):
        trainer().fit(a.module, b.data)


def test_overrides_that_say_what_an_argument_says(tiny):
    cases = {
        "model.path, and student": {"overrides": {"model.path": "x"}},
        "task.path, and data": {"overrides": ["task.path=x"]},
        "method, and method": {"overrides": ["method=sdft"]},
        "teacher.path, and teacher": {"teacher": tiny, "overrides": {"teacher.path": "x"}},
        "task.heldout.path, and heldout": {"heldout": ROWS, "overrides": {"task.heldout.path": "x"}},
        "task/verifier, and verify": {"verify": bool, "overrides": ["task/verifier=exact"]},
        "adapter.r, and adapter": {"adapter": LoraConfig(), "overrides": ["adapter=lora", "adapter.r=1"]},
    }
    for message, more in cases.items():
        with pytest.raises(ValueError, match=message.replace("adapter.r,", "adapter,")):
            Distillation("sft", tiny, ROWS, **more)


def test_options_that_a_trainer_of_the_users_own_does_not_follow():
    options = {"max_steps": 3, "precision": "32-true", "accelerator": "cpu"}
    said = list(ignored(options, options, trainer()))
    assert len(said) == 1 and said[0].startswith("overrides set trainer.max_steps=3, and this Trainer has max_steps=1, which")
    assert not list(ignored(options, options, trainer(max_steps=3)))


@pytest.mark.slow
def test_a_trainer_of_the_users_own_is_warned_of(tiny, caplog):
    d = Distillation("sft", tiny, ROWS, overrides=SMALL | {"trainer.max_steps": 3})
    for made, warnings in ((d.trainer(max_steps=1, accelerator="cpu"), 0), (trainer(), 1)):
        made.fit(d.module, d.data)
        assert caplog.text.count("overrides set trainer.max_steps=3") == warnings


def test_tokenizers(tiny):
    student, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    assert Models(student, Path(tiny)).holders[0].value.tokenizer.get_vocab() == tokenizer.get_vocab()
    holder = type("Processor", (), {"tokenizer": tokenizer})()
    cases = {
        "tokenizer=int is no tokenizer of transformers; give one of them, or a path": {"tokenizer": 5},
        "tokenizer=Processor is no tokenizer of transformers; give its .tokenizer": {"tokenizer": holder},
        "tokenizer=/no/where": {"tokenizer": "/no/where"},
        "teacher_tokenizer=int is no tokenizer": {"teacher": student, "teacher_tokenizer": 5},
        "teacher_tokenizer goes with a teacher": {"teacher_tokenizer": tokenizer},
    }
    for message, more in cases.items():
        with pytest.raises(ValueError, match=message):
            Models(student, **more)


def test_sentences_name_arguments(tiny):
    said = in_python("task.path=memory://data/5: teacher.path=memory://student/38 and memory://heldout/2 on the command line")
    assert said == "data: teacher and heldout in overrides"
    with pytest.raises(ValueError, match=r"WANDB_API_KEY.* in overrides would end in files") as secret:
        Distillation("sft", tiny, ROWS, overrides=["+WANDB_API_KEY=x"])
    assert "command line" not in str(secret.value)


@pytest.mark.slow
def test_errors_of_the_data_and_the_models_name_arguments(tiny):
    same = AutoModelForCausalLM.from_pretrained(tiny)
    cases = {
        "^all 40 rows of data have prompts that heldout holds out": ("sft", tiny, ROWS, {"heldout": ROWS}),
        "^data has 2 distinct prompts": ("sft", tiny, ROWS[:2], {}),
        "^teacher is the student's own start model": ("opd", same, PROMPTS, {"teacher": same}),
    }
    for message, (method, student, data, more) in cases.items():
        with pytest.raises(ValueError, match=message):
            Distillation(method, student, data, overrides=SMALL, **more)


def test_a_tokenizer_with_far_fewer_tokens_than_the_model():
    state, text = rows(ValidIds(30, ()), 50257)
    assert state == "warn" and "do not fit the model: give the model's own tokenizer" in text
    assert rows(ValidIds(151_669, ()), 151_936)[0] == "pass"
