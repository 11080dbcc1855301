"""The papers' recipes: each composes, binds and trains two updates on stand-ins, and says what that does not show."""

import logging
from pathlib import Path

import pytest

from opd_lightning.config import CONF_DIR, compose
from opd_lightning.config.compatibility import check
from opd_lightning.models import Pretrained, stand_in
from opd_lightning.training.run import run

RECIPES = sorted(p.stem for p in Path(CONF_DIR, "experiment").glob("*.yaml"))
PAPERS = [name for name in RECIPES if "qwen" in name]


QUICK = ("opsd_qwen3_1.7b", "sdft_qwen2.5_7b_tooluse")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAPERS])
def test_a_recipe_trains_two_updates_on_stand_ins(name, tmp_path, caplog):
    overrides = [f"experiment={name}", "model.stand_in=true", "trainer.max_steps=2", f"output_dir={tmp_path}", "logger=none"]
    with caplog.at_level(logging.WARNING, logger="opd_lightning.training.run"):
        folder = run(compose([*overrides, "trainer.accelerator=cpu", "task.n_eval=4"]))
    assert '"finished"' in (folder / "status.json").read_text()
    assert any(record.message.startswith("warning: stand-ins: the weights are random") for record in caplog.records)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_means_the_real_thing_without_the_switch(name):
    cfg = compose([f"experiment={name}"])
    check(cfg)
    assert cfg.model.path.startswith("Qwen/") and cfg.rollout.sampling.max_new_tokens >= 1024 and cfg.data.batch_size >= 32
    assert "stand-in" not in str(cfg.task.path)


def test_a_stand_in_is_the_same_every_time_and_has_a_thinking_switch():
    first, again = (Pretrained("stand-in://qwen3").model().state_dict() for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first)
    words = Pretrained("stand-in://qwen3").tokenizer()
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\u00e4"}]
    on, off = (words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=t) for t in (1, 0))
    assert off == f"{on}<think>\n\n</think>\n\n"
    assert words.decode(words("\u00e4 b\n c")["input_ids"]) == "\u00e4 b\n c"


def test_bad_stand_ins_are_refused():
    with pytest.raises(ValueError, match="stand-in://nothing is no stand-in; choose one of"):
        stand_in.rows("nothing")
    with pytest.raises(ValueError, match=r"model\.path=stand-in://nothing could not be loaded"):
        Pretrained("stand-in://nothing").model()
    with pytest.raises(ValueError, match=r"model\.stand_in=true, but model\.path=mine"):
        Pretrained("mine", stand_in=True)
