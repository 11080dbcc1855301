"""Every method's numbers are what they were: sampled tokens, losses, KLs, gradients' norms, what became of the weights."""

import pytest

from tests.recorded import LEFT_OUT, OTHER, PRESETS, SAME, cases, differences, load, platform, record

CASES = list(cases())


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder for models and runs."""
    return tmp_path_factory.mktemp("recorded")


FAST = [
    case for case in CASES if case.group == "world" or case.name in ("opd", "sdft", "grpo", "all_terms", "measured", "feedback")
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=f"{c.group}-{c.name}", marks=[] if c in FAST else pytest.mark.slow) for c in CASES],
)
def test_numbers_are_the_recorded_ones(case, workshop):
    told = load(case.group)[case.name]
    tolerance = SAME if told["platform"] == platform() else OTHER
    assert list(differences(told, record(case, workshop), tolerance)) == []


def test_every_preset_is_recorded_and_nothing_else_is():
    groups = {case.group: {other.name for other in CASES if other.group == case.group} for case in CASES}
    assert {group: set(load(group)) for group in groups} == groups
    assert groups["world"] == set(PRESETS) and groups["qwen3_lora"] == set(PRESETS) - set(LEFT_OUT)


@pytest.mark.parametrize("tolerance", [SAME, OTHER])
def test_a_change_is_told(tolerance):
    told = {"ids": [["1 2"], ["3"]], "logged": {"loss": [None, 0.5, 2e-9]}, "weights": {"total": [1.0, 0.0], "w": [1.0, 1e-9]}}
    more = 2 * tolerance
    assert not list(differences(told, told, tolerance))
    for change in (
        {"ids": [["1 2 2"], ["3"]]},
        {"ids": [["1 2"]]},
        {"logged": {"loss": [None, 0.5 + more, 2e-9]}},
        {"logged": {"loss": [None, float("nan"), 2e-9]}},
        {"logged": {"loss": [None, None, 2e-9]}},
        {"logged": {"loss": [None, 0.5, 2e-9 + more * 1e-3]}},
        {"logged": {"loss": [None, 0.5]}},
        {"logged": {"other": [None, 0.5, 2e-9]}},
        {"weights": {"total": [1.0, 0.0], "w": [1.0 + more, 1e-9]}},
        {"weights": {"total": [1.0, 0.0]}},
    ):
        assert list(differences(told, told | change, tolerance)), change


def test_the_platform_decides_what_is_compared():
    told = {"ids": [["1"], ["3"]], "logged": {"loss": [None, 0.5, 0.25]}, "weights": {"total": [1.0, 0.5]}}
    later = told | {"ids": [["1"], ["4"]], "logged": {"loss": [None, 0.5, 9.0]}, "weights": {"total": [9.0, 0.5]}}
    moved = told | {"weights": {"total": [1.0, 0.6]}}
    for change in (later, moved):
        assert list(differences(told, change, SAME)) and not list(differences(told, change, OTHER))
