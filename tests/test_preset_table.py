"""Every preset on many architectures, by the second table of docs/architectures.md."""

import pytest

from tests import presets
from tests.architectures import line, save
from tests.test_architecture_table import PAGE


def told() -> list[str]:
    """The lines of the page's table."""
    return PAGE.read_text().split("<!-- presets -->\n")[1].split("<!-- end of presets -->")[0].strip().splitlines()


def test_the_page_has_every_architecture_and_variant():
    lines = told()
    assert lines[0] == line(presets.HEADER)
    assert [row.strip("|").split("|")[0] for row in lines[2:]] == presets.ARCHITECTURES
    taught = sum(presets.overrides(preset, "EMA") is not None for preset in presets.PRESETS)
    assert f"{len(presets.PRESETS)} presets" in PAGE.read_text() and f"{taught} of them have a teacher" in PAGE.read_text()


@pytest.mark.parametrize(("name", "preset", "variant"), [("lfm2", "sdpo", "LoRA + EMA"), ("falcon_h1", "seqkd", "EMA")])
def test_a_hybrid_model_trains(name, preset, variant, tmp_path):
    assert presets.tried(name, variant, tmp_path, [preset]) == {preset: "works"}


def test_a_model_that_no_preset_can_train_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^model\.path=.* is of the architecture qwen2_5_vl, for which .*\.$"):
        presets.train(save("qwen2_5_vl", tmp_path / "vl"), save("llama", tmp_path / "other"), tmp_path, ["method=sft"])


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.ARCHITECTURES)
def test_a_row_of_the_table(name, tmp_path):
    assert presets.row(name, tmp_path) in told()
