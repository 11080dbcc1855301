"""Distillation: models, tokenizers and rows in memory, with a Lightning Trainer of the user's own."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd_lightning
from opd_lightning import Distillation, Verdict, compose
from opd_lightning.callbacks import HealthChecks
from opd_lightning.config import plain
from opd_lightning.tasks.in_memory import FunctionVerifier, rows_of
from opd_lightning.training.arguments import Models, adapter_node, has_reply, words_of
from opd_lightning.types import Example
from opd_lightning.utils.in_memory import held

ROWS = [{"prompt": f"swap {' '.join(f'{i:05}')}", "completion": f"answer {' '.join(f'{i:05}')}"} for i in range(40)]
SMALL = {"task.max_new_tokens": 6, "data.batch_size": 4, "task.n_eval": 4}


def right(example: Example, text: str) -> bool:
    return text == example.extra["completion"]


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer(**arguments) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "max_steps": 2, **quiet, **arguments})


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_importing_the_package_imports_nothing_large():
    program = (
        "import sys, opd_lightning; print([m for m in ('torch', 'lightning', 'transformers', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_the_package():
    assert all(hasattr(opd_lightning, name) for name in opd_lightning.__all__)
    assert set(opd_lightning.__all__) == set(opd_lightning.PLACES) <= set(dir(opd_lightning))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        opd_lightning.distil  # noqa: B018


@pytest.mark.slow
def test_training_changes_no_model_that_is_given(tiny, other):
    """Of student and teacher, and the trained model is neither of them."""
    student, teacher = load(tiny), load(other)
    before, taught = state(student), state(teacher)
    d = Distillation("opd", student, [row["prompt"] for row in ROWS], teacher=teacher, overrides=SMALL)
    trainer().fit(d.module, d.data)
    assert same(student, before) and same(teacher, taught) and not same(d.model, before)
    assert all(p.requires_grad for p in teacher.parameters()) and not d.model.training
    shared = next(d.module.teachers["teacher"].weights.model.lm.parameters())
    assert shared.data_ptr() == next(teacher.parameters()).data_ptr()
    assert d.results.start["step"] == 0 and d.results.end["step"] == 2
    assert {"heldout/reverse_kl", "heldout/forward_kl"} <= set(d.results.end)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "grpo", "sdft", "opd_topk", "sft_kl", "sdpo"])
def test_methods_by_name(method, tiny, other):
    reads = {"teacher": load(other)} if method == "opd_topk" else {}
    d = Distillation(method, load(tiny), ROWS, verify=right, overrides=SMALL, **reads)
    trainer().fit(d.module, d.data)
    assert d.cfg.name == method and {"new/accuracy", "new/length"} <= set(d.results.end)


@pytest.mark.slow
def test_equal_to_the_command_line(tiny, tmp_path):
    """The same weights as by `run` on a file of the same rows."""
    import json

    from opd_lightning import run

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["trainer.max_steps=3", "trainer.accelerator=cpu", f"output_dir={tmp_path}", "logger=none", "evaluation=text"]
    sizes = [f"{key}={value}" for key, value in SMALL.items()]
    words = ["method=sft", f"model.path={tiny}", "task=table", f"task.path={path}", "task.columns.completion=completion"]
    checkpoint = torch.load(run(compose([*words, *options, *sizes])) / "checkpoints" / "last.ckpt", weights_only=True)
    d = Distillation("sft", load(tiny), ROWS, overrides=SMALL)
    trainer(max_steps=3).fit(d.module, d.data)
    assert all(torch.equal(d.module.student.state_dict()[k[8:]], v) for k, v in checkpoint["state_dict"].items())


@pytest.mark.slow
def test_lightning_callbacks_loggers_checkpoints_and_test(tiny, tmp_path):
    d = Distillation("sft", tiny, ROWS, verify=right, overrides=SMALL | {"evaluation.every": 1})
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1)
    stopper = EarlyStopping("train/loss", patience=50, check_on_train_epoch_end=True)
    checks = HealthChecks(patience=3)
    logger = CSVLogger(tmp_path, name="log")
    with_all = {"callbacks": [saver, stopper, checks], "logger": logger, "enable_checkpointing": True, "max_steps": 4}
    first = trainer(**with_all)
    before = first.test(d.module, d.data, verbose=False)[0]
    first.fit(d.module, d.data)
    assert before["new/accuracy"] == d.results.start["new/accuracy"]
    assert [row["step"] for row in d.results.history] == [0, 1, 2, 3, 4]
    assert [c for c in first.callbacks if isinstance(c, HealthChecks)] == [checks]
    assert "train/loss" in Path(logger.log_dir, "metrics.csv").read_text()
    after = trainer().test(d.module, d.data, verbose=False)[0]
    assert after["new/length"] == d.results.end["new/length"]
    ended = state(d.model)
    again = Distillation("sft", tiny, ROWS, verify=right, overrides=SMALL | {"evaluation.every": 1})
    half = str(next(tmp_path.glob("*step=2.ckpt")))
    trainer(max_steps=4).fit(again.module, again.data, ckpt_path=half, weights_only=True)
    assert same(again.model, ended) and len(again.results.history) == 5


@pytest.mark.slow
def test_epochs_are_passes_through_the_data(tiny):
    d = Distillation("sft", tiny, ROWS, overrides=SMALL)
    fitted = trainer(max_steps=-1, max_epochs=1)
    fitted.fit(d.module, d.data)
    assert fitted.global_step == -(-len(d.data.examples) // 4)


@pytest.mark.slow
def test_arguments_of_a_trainer_that_would_be_ignored(tiny):
    d = Distillation("sft", tiny, ROWS, overrides=SMALL)
    with pytest.raises(ValueError, match=r"limit_train_batches=3 .* trainer\.max_steps"):
        trainer(limit_train_batches=3).fit(d.module, d.data)
    with pytest.raises(ValueError, match="no argument of lightning"):
        d.trainer(steps=3)
    half = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    d = Distillation("sft", half, ROWS, overrides=SMALL)
    with pytest.raises(ValueError, match="float32"):
        trainer().fit(d.module, d.data)


@pytest.mark.slow
def test_an_adapter_is_saved_as_peft_does(tiny, tmp_path):
    student = load(tiny)
    d = Distillation("sft", student, ROWS, adapter=LoraConfig(r=4, target_modules="all-linear"), overrides=SMALL)
    d.trainer(max_steps=2, accelerator="cpu").fit(d.module, d.data)
    assert not any("lora" in name for name, _ in student.named_parameters())
    d.model.save_pretrained(tmp_path / "adapter")
    d.tokenizer.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(load(tiny), str(tmp_path / "adapter"))
    ids = torch.arange(4)[None]
    assert torch.equal(loaded(ids).logits, d.model(ids).logits)


@pytest.mark.slow
def test_results_in_a_notebook(tiny):
    d = Distillation("sft", tiny, ROWS, verify=right, overrides=SMALL)
    with pytest.raises(ValueError, match=r"no results yet; call trainer\.fit"):
        d.results  # noqa: B018
    trainer().fit(d.module, d.data)
    assert "<td>new/accuracy</td>" in d.results._repr_html_()
    assert d.results.figure()._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no number"):
        d.results.figure("old/accuracy")
    assert len(d.results.answers["start"]) == len(d.results.answers["end"]) == 4


@pytest.mark.slow
def test_data_sets_heldout_rows_and_tasks(tiny):
    from datasets import Dataset

    from opd_lightning.toy.world import WorldTask

    heldout = [{"prompt": [{"role": "user", "content": "swap 9 9 9 9 8"}], "completion": "answer 9 9 9 8 9"}]
    d = Distillation("sft", tiny, Dataset.from_list(ROWS), heldout=heldout, overrides=SMALL)
    assert len(d.data.examples) == 36 and [e.id for e in d._parts.task.examples("test")] == ["heldout:1"]
    task = WorldTask("swap", "native", n_train=8, n_eval=4)
    task.batch_size = 2
    d = Distillation("sft", tiny, task)
    trainer().fit(d.module, d.data)
    assert d.cfg.data.batch_size == 2 and "new/accuracy" in d.results.end


def test_wrong_arguments(tiny):
    student, tokenizer = load(tiny), AutoTokenizer.from_pretrained(tiny)
    cases = {
        "data is missing": ("sft", tiny, None, {}),
        "data is empty": ("sft", tiny, [], {}),
        "student is missing": ("sft", None, ROWS, {}),
        "student=dict is no model": ("sft", {}, ROWS, {}),
        "a path with a tokenizer of its own": ("sft", tiny, ROWS, {"tokenizer": tokenizer}),
        "verify goes with rows": ("grpo", tiny, None, {"verify": right}),
        "overrides=.* is one text": ("sft", tiny, ROWS, {"overrides": "optim.lr=1"}),
        "student=PeftModel is no model .* base model": ("sft", get_peft_model(load(tiny), LoraConfig()), ROWS, {}),
        "has an adapter already": ("sft", get_peft_model(student, LoraConfig()).get_base_model(), ROWS, {}),
    }
    for message, (method, model, data, more) in cases.items():
        with pytest.raises(ValueError, match=message):
            Distillation(method, model, data, **more)


@pytest.mark.slow
def test_wrong_overrides_and_teachers(tiny, other):
    cases = {
        "method=odp is no option of method; did you mean opd": ("odp", tiny, ROWS, {"teacher": other}),
        "teacher is missing: method=opd": ("opd", tiny, ROWS, {}),
        "teacher is given, and method=sdft": ("sdft", tiny, ROWS, {"teacher": other}),
        "optim.rl=1 is no key; known are .*optim.lr,": ("sft", tiny, ROWS, {"overrides": {"optim.rl": 1}}),
    }
    for message, (method, model, data, more) in cases.items():
        with pytest.raises(ValueError, match=message):
            Distillation(method, model, data, **more)


@pytest.mark.slow
def test_wrong_models_and_data(tiny, other):
    student, teacher = load(tiny), load(other)
    student.config.name_or_path = ""
    with pytest.raises(ValueError, match=r"tokenizer is missing .* give the tokenizer of student"):
        Distillation("opd", student, ROWS, teacher=teacher, overrides=SMALL)
    with pytest.raises(ValueError, match="verify"):
        Distillation("grpo", tiny, ROWS, overrides=SMALL)
    with pytest.raises(ValueError, match="data:3: the prompt is empty"):
        Distillation("sft", tiny, [*ROWS[:2], {"prompt": " ", "completion": "x"}, *ROWS[2:]], overrides=SMALL)
    same_model = load(tiny)
    with pytest.raises(ValueError, match="the gradient is zero"):
        Distillation("opd", same_model, ROWS, teacher=same_model, overrides=SMALL)


def test_rows():
    chat = [{"role": "user", "content": "x"}]
    assert rows_of(["a", chat, {"prompt": "b"}], "data") == [{"prompt": "a"}, {"prompt": chat}, {"prompt": "b"}]
    for wrong, message in ((chat, "is one chat"), ({"train": []}, "mapping of train"), ([3], "data:1 is int"), (3, "no rows")):
        with pytest.raises(ValueError, match=message):
            rows_of(wrong, "data")  # type: ignore[arg-type]
    assert has_reply({"messages": [*chat, {"role": "assistant", "content": "y"}]}) and not has_reply({"prompt": chat})


def test_a_verifier_that_is_a_function():
    example = Example("1", [])
    assert FunctionVerifier(lambda e, text: text == "x")(example, "x") == Verdict(1.0)
    assert FunctionVerifier(lambda e, text: Verdict(0.5, 1.0))(example, "") == Verdict(0.5, 1.0)
    for wrong, message in (
        (lambda e, t: 2, "scores must lie"),
        (lambda e, t: e.x, "AttributeError"),
        (lambda e, t: None, "None"),
    ):
        with pytest.raises(ValueError, match=message):
            FunctionVerifier(wrong)(example, "")
    with pytest.raises(ValueError, match="no function"):
        FunctionVerifier("exact")  # type: ignore[arg-type]


def test_overrides_and_adapters():
    assert words_of({"adapter": "lora", "optim.lr": 1e-4, "x": None}) == ["adapter=lora", "optim.lr=0.0001", "x=null"]
    node = adapter_node(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert node == {"_target_": "peft.LoraConfig", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    assert plain(compose(["adapter=lora"]))["adapter"]["_target_"] == node["_target_"]
    with pytest.raises(ValueError, match="no configuration of PEFT"):
        adapter_node({"r": 4})


def test_objects_live_as_long_as_their_holder(tiny):
    models = Models(load(tiny))
    path = models.student
    assert held(path).model is models.holders[0].value.model
    del models
    with pytest.raises(ValueError, match="another program"):
        held(path)
