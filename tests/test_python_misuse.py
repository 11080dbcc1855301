"""Misuse from Python: what would be left out, ignored or overwritten in silence is said, or refused with a remedy."""

import json

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from opd_lightning import Distillation
from opd_lightning.config.trainer_arguments import check_optimization
from opd_lightning.preflight.rendering import left_rows
from opd_lightning.tasks.table import TableTask

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
