"""Old names of members in users' own context builders work for one release."""

import logging

import pytest

from opd_lightning.teachers import BaseTeacher
from opd_lightning.teachers.contexts import NoContext, Sibling
from opd_lightning.utils.deprecation import warn_once


@pytest.fixture
def warnings(caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.message for record in caplog.records]


def test_old_class_attributes_and_methods_of_a_context_are_the_new_ones(warnings):
    class Mine(NoContext):
        informs = True
        reads_attempts = True

        def wording(self) -> str:
            return "mine"

    mine = Mine()
    assert mine.privileged and mine.needs_rollouts and mine.template_text() == "mine"
    assert [text.split(";")[0] for text in warnings()] == [
        "warning: Mine.informs is now privileged",
        "warning: Mine.reads_attempts is now needs_rollouts",
        "warning: Mine.wording is now template_text",
    ]
    assert not NoContext.privileged


def test_an_old_method_may_call_the_one_that_it_extends():
    class Mine(Sibling):
        def wording(self) -> str:
            return super().wording() + "mine"

    class Other(Mine):
        def template_text(self) -> str:
            return super().template_text() + "!"

    assert Mine("{prompt} then {sibling}").template_text() == " then mine"
    assert Other("{prompt} then {sibling}").template_text() == Other("{prompt} then {sibling}").wording() == " then mine!"


def test_an_attribute_that_an_instance_sets_by_its_old_name_is_the_new_one(warnings):
    class Mine(NoContext):
        def __init__(self, informs: bool):
            super().__init__()
            self.informs = informs

    assert Mine(True).privileged and not Mine(False).privileged and Mine(True).informs
    assert len(warnings()) == 1


def test_current_names_give_no_warning(warnings):
    class Mine(NoContext):
        privileged = True

        def template_text(self) -> str:
            return "mine"

    assert Mine().template_text() == "mine" and not warnings()


def test_a_context_that_inherits_nothing_is_refused_by_the_new_names():
    class Mine:
        informs = reads_attempts = True

    with pytest.raises(ValueError, match=r"context=Mine lacks privileged, needs_rollouts, .*derive it from .*NoContext"):
        BaseTeacher(Mine())  # type: ignore[arg-type]
