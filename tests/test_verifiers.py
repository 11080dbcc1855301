"""Verifiers by hand: what counts as right, what as well-formed, and no text that they fall over."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.tasks.recipes import tool_calls
from opd_lightning.tasks.verifiers import Function, Math, Numeric, Regex, choice, exact
from opd_lightning.types import Verdict

NUMERIC = [
    ("The answer is 72.", "72", 1.0),
    ("72 apples, so 1,234.50 in all", "1234.5", 1.0),
    ("It costs $-3", "-3", 1.0),
    ("half: .5", "0.5", 1.0),
    ("1e3", "1000", 1.0),
    ("between 3 and 4", "3", 0.0),
    ("1,2,3", "3", 1.0),
    ("no number", "3", 0.0),
    ("", "3", 0.0),
    ("0.3333333", "0.3333334", 1.0),
    ("1000001", "1000000", 0.0),
    ("12345679", "12345678", 0.0),
    ("1/2", "2", 0.0),
    ("so 3/4", "0.75", 1.0),
    ("5", "1/5", 0.0),
    ("7", "1e999", 0.0),
    ("1/0", "1", 0.0),
    ("9" * 5000, "3", 0.0),
    ("1/" + "9" * 5000, "3", 0.0),
    ("1" + ",000" * 2000, "3", 0.0),
    ("0." + "3" * 5000, "0.3333333", 0.0),
    ("3", "9" * 5000, 0.0),
    ("9" * 300, "9" * 300, 1.0),
]


@pytest.mark.parametrize(("completion", "answer", "content"), NUMERIC, ids=lambda value: str(value)[:20])
def test_numeric(completion, answer, content):
    assert Numeric()(completion, answer) == Verdict(content, None)


def test_numeric_behind_a_marker():
    assert Numeric("####")("1+1=2\n#### 2\nThat took 5 minutes", "so\n#### 2") == Verdict(1.0, 1.0)
    assert Numeric("####")("first #### 3, no: #### 2", "#### 2") == Verdict(1.0, 1.0)
    assert Numeric("####")("It is 2", "#### 2") == Verdict(1.0, 0.0)
    assert Numeric("####")("2 ####", "#### 2") == Verdict(0.0, 0.0)


def test_exact_and_regex():
    assert exact(" The  cat ", "the cat").content == 1.0 and exact("The cat", "the cat", ignore_case=False).content == 0.0
    assert exact("the cat.", "the cat").content == 0.0
    tagged = Regex(r"<a>(.*?)</a>|<b>(.*?)</b>")
    assert tagged("<a>no</a> <a> yes </a>", "yes") == Verdict(1.0, 1.0) == tagged("<b>yes</b>", "yes")
    assert tagged("yes", "yes") == Verdict(0.0, 0.0)
    assert Regex(r"\d+")("code 42", "42") == Verdict(1.0, 1.0)
    for verifier, field in ((Regex, "pattern"), (Numeric, "marker")):
        with pytest.raises(ValueError, match=rf"task\.verifier\.{field}='\(' is no regular expression"):
            verifier("(")


CHOICE = [
    ("<answer>B</answer>", 1.0, 1.0),
    ("I first thought the answer is (A). No: the answer is (B).", 1.0, 1.0),
    ("Answer: **B**", 1.0, 1.0),
    ("\\boxed{\\text{B}}", 1.0, 1.0),
    ("B", 1.0, 0.0),
    ("B) because A is wrong", 1.0, 0.0),
    ("**B**", 1.0, 0.0),
    ("<answer>B: Water</answer>", 1.0, 1.0),
    ("The answer is I think B", 0.0, 0.0),
    ("A big tree", 0.0, 0.0),
    ("Both are right, but the answer is Because", 0.0, 0.0),
    ("<answer>A</answer> although the answer is B", 0.0, 1.0),
]


@pytest.mark.parametrize(("completion", "content", "format"), CHOICE)
def test_choice(completion, content, format):
    assert choice(completion, "B") == Verdict(content, format)


def test_the_answer_of_a_choice_is_looked_for_too():
    assert choice("B", "\\boxed{B}").content == choice("B", "The answer is B.").content == choice("B", "(B)").content == 1.0
    assert choice("A", "Acetone").content == 0.0


MATH = [
    ("So $\\boxed{\\frac{1}{2}}$", "0.5", 1.0),
    ("The result is \\boxed{(3, \\frac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)", 1.0),
    ("\\boxed{x^2+2x+1}", "$(x+1)^2$", 1.0),
    ("\\boxed{3}", "Therefore $\\boxed{4}$.", 0.0),
    ("\\boxed{", "4", 0.0),
]


@pytest.mark.parametrize(("completion", "answer", "content"), MATH)
def test_math(completion, answer, content):
    pytest.importorskip("math_verify")
    assert Math()(completion, answer) == Verdict(content, 1.0)


def by_length(completion: str, answer: str) -> float:
    return min(1.0, len(completion) / len(answer))


def broken(completion: str, answer: str) -> float:
    return 7.0 if completion else float(answer)


def test_a_function_of_ones_own():
    verifier = Function("tests.test_verifiers.by_length")
    assert verifier("ab", "abcd") == Verdict(0.5, None) and Function("operator.eq")("a", "a") == Verdict(1.0, None)
    with pytest.raises(ValueError, match=r"task\.verifier\.path=tests\.test_verifiers\.nope cannot be imported"):
        Function("tests.test_verifiers.nope")
    with pytest.raises(ValueError, match="operator is no function"):
        Function("operator")
    with pytest.raises(ValueError, match=r"returned 7\.0; scores must lie in \[0, 1\]"):
        Function("tests.test_verifiers.broken")("x", "y")
    with pytest.raises(ValueError, match=r"raised ValueError .* on completion='', answer='y'"):
        Function("tests.test_verifiers.broken")("", "y")


def test_tool_calls_count_tools_and_merge_arguments():
    gold = '[{"Action": "get", "Action_Input": {"a": {"b": 1}}}, {"Action": "put", "Action_Input": {}}]'
    said = 'Action: put\nAction Input: {}\nAction: get\nAction Input: {"a": {"b": 1}} done'
    assert tool_calls(said, gold) == Verdict(1.0, 1.0)
    assert tool_calls(said.replace("1", "2"), gold) == Verdict(0.0, 1.0)
    assert tool_calls(said + "\nAction: get", gold).content == 0.0
    assert tool_calls('Action: get\nAction Input: {"a": ', gold) == Verdict(0.0, 0.0)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60) | st.tuples(st.text("0123456789,./e- #", max_size=6), st.integers(1, 2000)).map(lambda t: t[0] * t[1])
)
def test_no_text_breaks_a_verifier(text):
    for verdict in (
        exact(text, "a"),
        Numeric("#")(text, "1"),
        Regex(r"<a>(.*?)</a>")(text, "a"),
        choice(text, "A"),
        tool_calls(text, '[{"Action": "a", "Action_Input": {}}]'),
    ):
        assert 0.0 <= verdict.content <= 1.0
