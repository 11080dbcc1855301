"""The reference of keys: --help keys has all of them, and every key has a type and a meaning."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from opd_lightning.config import CONF_DIR, compose
from opd_lightning.config.help import page
from opd_lightning.config.reference import PRESETS, options
from opd_lightning.config.reference_text import terminal

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = options()


def test_help_keys_has_every_option_and_every_key():
    text = terminal("keys", [Path(CONF_DIR)], 10_000)
    for option in OPTIONS:
        assert f"{option.title or 'every run'}: {option.meaning}" in text
        for key in option.keys:
            assert f"  {key.place} = {key.default}" in text and f"      {key.meaning}" in text


def test_every_option_is_there_and_every_key_has_a_type_and_a_meaning():
    files = {f"{p.parent.relative_to(CONF_DIR).as_posix()}={p.stem}" for p in Path(CONF_DIR).glob("*/**/*.yaml")}
    assert {option.title for option in OPTIONS} == files | {"every run"}
    assert all(option.meaning for option in OPTIONS)
    assert [(o.title, k) for o in OPTIONS for k in o.keys if not (k.type and k.meaning)] == []


def test_every_key_of_a_default_run_is_in_the_reference():
    """Those of methods are choices of options and keys of theirs."""

    def places(node, place=""):
        for key, value in node.items():
            if isinstance(value, dict) and value and f"{place}{key}" not in known:
                yield from places(value, f"{place}{key}.")
            elif not key.startswith("_"):
                yield f"{place}{key}"

    known = {key.place for option in OPTIONS for key in option.keys}
    groups = {option.group.replace("/", ".") for option in OPTIONS}
    for method in ("opd", "sdft", "grpo", "gkd"):
        found = set(places(OmegaConf.to_container(compose([f"method={method}"]))))
        unknown = {place.replace("rollout.other", "rollout") for place in found} - known - groups - {"experiment"}
        assert {place for place in unknown if not place.startswith("evaluation.suite")} == set()


def test_types_and_meanings_are_those_of_comment_signature_and_docstring():
    keys = {key.place: key for option in OPTIONS if option.group not in PRESETS for key in option.keys}
    assert keys["optim.lr"][1:] == ("2.0e-5", "float", "peak learning rate")  # of a docstring
    assert keys["trainer.max_steps"].meaning.startswith("Updates: 100") and keys["trainer.max_steps"].type == "int"
    assert keys["optim.clip_norm"].type == "float or null"
    assert keys["reference.dtype"].meaning == keys["model.dtype"].meaning  # what it follows


@pytest.mark.parametrize(
    ("topic", "part", "not_there"),
    [
        ("optim.lr", "peak learning rate", "warmup"),
        ("lr", "peak learning rate", "warmup"),
        ("optim", "optim.warmup_steps = 10", "loss"),
        ("loss/divergence=jsd", "loss.divergence.beta = 0.5 (float)", "alpha"),
        ("keys", "data.batch_size", "Groups and their options"),
    ],
)
def test_help_on_keys(monkeypatch, topic, part, not_there):
    monkeypatch.setenv("COLUMNS", "80")
    told = page(["--help", topic])
    assert part in " ".join(told.split()) and not_there not in told
    assert max(map(len, told.splitlines())) <= 80


def test_help_on_ones_own_option_and_on_an_unknown_key(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text("# Mine: python -m opd_lightning optim=mine\nspeed: 3   # how fast\n")
    assert "how fast" in page(["--config-dir", str(tmp_path), "--help", "optim.speed"])
    with pytest.raises(ValueError, match=r"--help lrr: .*did you mean optim\.lr\?"):
        page(["--help", "lrr"])


@pytest.mark.parametrize("name", ["troubleshooting", "metrics", "metrics_reference", "configuration", "installing"])
def test_keys_that_a_page_names_are_keys(name):
    known = {key.place for option in OPTIONS for key in option.keys} | {o.group.replace("/", ".") for o in OPTIONS}
    known |= {".".join(place.split(".")[:n]) for place in known for n in range(1, 5)}
    cells = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", (ROOT / "docs" / f"{name}.md").read_text())
    wrong = {cell for cell in cells if cell not in known and not (ROOT / cell).exists()}
    files = {"samples.jsonl", "status.json", "ledger.json", "metrics.csv", "adapter_config.json", "mine.yaml"}
    assert wrong - files == set()
