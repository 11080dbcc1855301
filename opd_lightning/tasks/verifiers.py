"""Verifiers of completions: each is called as verifier(completion, answer), two texts, and returns a `Verdict`.

The answer is the data set's; from a reference solution that ends in it ("... #### 72", "... \\boxed{72}") it is extracted
as from the completion. A user's own verifier may return a bool or a score in [0, 1] instead.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from opd_lightning.config.names import find
from opd_lightning.types import Verdict

NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?(?:\s?/\s?\d+(?![\d.]))?"
)
"""A number: commas between groups of three digits, decimals, an exponent, a simple fraction."""

DIGITS = 300
"""The longest number in characters: Python refuses to parse thousands of digits, which a model may generate."""


class VerifierTimeout(BaseException):
    """A verdict exceeded its time limit; no Exception, for verifiers catch those of their parsers."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """A context that raises `VerifierTimeout` after some seconds; None sets no limit.

    It works in the main thread with alarm signals (not on Windows), and for Python code and regular expressions, not for one
    long call of a C library. An alarm that is set inside (math-verify's) replaces it; one from outside is restarted.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def raise_timeout(*_: Any) -> None:
        raise VerifierTimeout

    handler = signal.signal(signal.SIGALRM, raise_timeout)
    outer_timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *outer_timer)


def exact(completion: str, answer: str, ignore_case: bool = True) -> Verdict:
    """Right if the completion equals the answer, up to blanks."""
    text, expected = " ".join(completion.split()), " ".join(answer.split())
    return Verdict(float(text.lower() == expected.lower() if ignore_case else text == expected))


def contains(completion: str, answer: str) -> Verdict:
    """Right if the completion contains the answer, up to case and blanks, not as a part of a longer word."""
    text, expected = " ".join(completion.lower().split()), " ".join(answer.lower().split())
    return Verdict(float(re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text) is not None))


class Numeric:
    """The verifier of numbers: the completion's last number must be the answer's. Integers are compared exactly.

    Args:
        marker: a regular expression before the final number, such as "####" or "answer is"; where it occurs, the first
            number behind its last occurrence counts, and the format is whether it occurs.
        tolerance: largest relative difference of numbers that are no integers (absolute below 1).

    Raises:
        ValueError: the marker is no regular expression.
    """

    def __init__(self, marker: str | None = None, tolerance: float = 1e-6):
        self.marker, self.tolerance = None if marker is None else compiled("task.verifier.marker", marker), tolerance

    def __call__(self, completion: str, answer: str) -> Verdict:
        """Right if both have a number and they agree."""
        number, announced = self.final(completion)
        expected, _ = self.final(answer)
        close = number is not None and expected is not None and self.agree(number, expected)
        return Verdict(float(close), None if self.marker is None else float(announced))

    def agree(self, number: Fraction, expected: Fraction) -> bool:
        """Whether two numbers are equal, within the tolerance where one is no integer."""
        if number.denominator == expected.denominator == 1:
            return number == expected
        return abs(number - expected) <= Fraction(self.tolerance) * max(Fraction(1), abs(expected))

    def final(self, text: str) -> tuple[Fraction | None, bool]:
        """The last number of a text, or the one behind the marker, and whether there was a marked one."""
        announced = list(self.marker.finditer(text)) if self.marker is not None else []
        if announced:
            after_marker = numbers(text[announced[-1].end() :])
            return (after_marker[0] if after_marker else None), bool(after_marker)
        all_numbers = numbers(text)
        return (all_numbers[-1] if all_numbers else None), False


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text as fractions, without divisions by zero and numbers of more than 300 characters."""
    fractions = []
    for match in NUMBER.findall(text):
        if len(match) > DIGITS:
            continue
        numerator, _, denominator = match.replace(",", "").replace(" ", "").partition("/")
        if not denominator or int(denominator):
            fractions.append(Fraction(numerator) / int(denominator or 1))
    return fractions


def compiled(field: str, pattern: str) -> re.Pattern[str]:
    """A regular expression, or ValueError."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r} is no regular expression ({error}).") from error


class Regex:
    """The verifier by a regular expression: its last match must be the answer; the format is whether it matches.

    Args:
        pattern: the first group that matched counts, without groups the full match.
        ignore_case: for the comparison with the answer.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    def __init__(self, pattern: str, ignore_case: bool = True):
        self.pattern, self.ignore_case = compiled("task.verifier.pattern", pattern), ignore_case

    def __call__(self, completion: str, answer: str) -> Verdict:
        """Right if the matched text equals the answer, up to blanks."""
        matches = list(self.pattern.finditer(completion))
        if not matches:
            return Verdict(0.0, 0.0)
        groups = [group for group in matches[-1].groups() if group is not None]
        return Verdict(exact(groups[0] if groups else matches[-1].group(0), answer, self.ignore_case).content, 1.0)


LETTER = r"[*(\s]*([A-J])(?![A-Za-z])"
CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?i:<answer>){LETTER}",
        rf"\\boxed\{{(?:\\text\{{)?{LETTER}",
        rf"(?i:\banswer\b|\boption\b|\bchoice\b)(?:\s+(?i:is))?\s*:?{LETTER}(?!\s+[a-z])",
    )
)
"""Patterns that announce a choice; the first that occurs counts. "The answer is I think B" matches none."""


def choice(completion: str, answer: str) -> Verdict:
    """Right if the chosen letter, A to J in capitals, is the answer's; the format is whether it is announced.

    Announced: <answer>B</answer>, \\boxed{B}, "the answer is (B)". Otherwise a completion that is a letter, or begins
    with one as in "B) because", still counts as right.
    """
    letter, announced = chosen(completion)
    return Verdict(float(letter is not None and letter == chosen(answer)[0]), float(announced))


def chosen(text: str) -> tuple[str | None, bool]:
    """The letter that a text chooses, and whether it is announced."""
    for pattern in CHOICES:
        if letters := pattern.findall(text):
            return letters[-1], True
    bare = re.match(r"[*(\s]*([A-J])(?:[*).:]|\s*$)", text)
    return (bare.group(1) if bare else None), False


class Math:
    """The verifier of mathematical equality by math-verify (LaTeX, fractions, sets, intervals).

    The format is whether the completion has a \\boxed{...}.

    Args:
        seconds: limit of each comparison; an integer, for math-verify sets an alarm.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, seconds: int = 5):
        try:
            import math_verify
        except ImportError as error:
            raise ValueError("task/verifier=math needs a package: pip install 'opd-lightning[math]'.") from error
        self.seconds, self.library = seconds, math_verify

    def __call__(self, completion: str, answer: str) -> Verdict:
        """math-verify's verdict; wrong if it cannot parse a text, or not in time."""
        # math-verify would parse only the last number of bare LaTeX; between dollars it parses all of it.
        gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        gold_parsed, parsed = (self.library.parse(text, parsing_timeout=self.seconds) for text in (gold, completion))
        equal = self.library.verify(gold_parsed, parsed, timeout_seconds=self.seconds)
        return Verdict(float(equal), float("\\boxed" in completion))


class Function:
    """The verifier by a user's function, called as function(completion, answer).

    Args:
        path: the function's dotted path, such as "my_package.scores.score".

    Raises:
        ValueError: it cannot be imported, or is no function.
    """

    partial_scores = True

    def __init__(self, path: str):
        try:
            self.function: Callable[[str, str], Any] = find(path)
            if not callable(self.function):
                raise ValueError(f"{path} is no function")
        except ValueError as error:
            raise ValueError(
                f"task.verifier.path={path} cannot be imported ({error}); give package.module.function."
            ) from error
        self.path = path

    def __call__(self, completion: str, answer: str) -> Verdict:
        """The function's result: a Verdict, a bool, or a score in [0, 1].

        Raises:
            ValueError: it raises, or returns something else.
        """
        try:
            score = self.function(completion, answer)
            verdict = score if isinstance(score, Verdict) else Verdict(float(score))
        except Exception as error:
            raise ValueError(
                f"task.verifier.path={self.path} raised {type(error).__name__} ({error}) on completion={completion[:80]!r}, "
                f"answer={answer[:80]!r}; a verifier must judge any text."
            ) from error
        if not 0.0 <= verdict.content <= 1.0:
            raise ValueError(f"task.verifier.path={self.path} returned {verdict.content}; scores must lie in [0, 1].")
        return verdict
