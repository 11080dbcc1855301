"""Verifiers: is a completion right? Each is called as verifier(completion, answer), two texts, and returns a `Verdict`.

The answer is the data set's; where the reference solution ends in it ("... #### 72", "... \\boxed{72}") it is looked for
in the answer just as in the completion. A verifier of your own may return a bool or a score in [0, 1] instead.
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
"""What is longer is no number: Python refuses to read thousands of digits, and a model may write them."""


class Late(BaseException):
    """A verdict was not there in time; no Exception, for verifiers catch those that their parsers raise."""


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Raise `Late` if what is inside takes longer; None waits.

    It holds in the main thread, where alarms ring (not on Windows), and for what looks for them: Python code and regular
    expressions, not one long step of a C library. An alarm that is set inside (math-verify's) replaces it; one that waited
    outside begins anew.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise Late

    handler = signal.signal(signal.SIGALRM, ring)
    waiting = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *waiting)


def exact(completion: str, answer: str, ignore_case: bool = True) -> Verdict:
    """The whole completion is the answer, blanks apart."""
    said, right = " ".join(completion.split()), " ".join(answer.split())
    return Verdict(float(said.lower() == right.lower() if ignore_case else said == right))


def contains(completion: str, answer: str) -> Verdict:
    """The completion says the answer somewhere, case and blanks apart, not as a part of a longer word."""
    said, right = " ".join(completion.lower().split()), " ".join(answer.lower().split())
    return Verdict(float(re.search(rf"(?<!\w){re.escape(right)}(?!\w)", said) is not None))


class Numeric:
    """The last number of the completion is that of the answer. Whole numbers are compared exactly.

    Args:
        marker: a regular expression that announces the final number, such as "####" or "answer is"; where it occurs, the
            first number behind its last occurrence counts, and the format is whether it occurs.
        tolerance: largest relative difference of numbers that are not whole (absolute below 1).

    Raises:
        ValueError: the marker is no regular expression.
    """

    def __init__(self, marker: str | None = None, tolerance: float = 1e-6):
        self.marker, self.tolerance = None if marker is None else compiled("task.verifier.marker", marker), tolerance

    def __call__(self, completion: str, answer: str) -> Verdict:
        """Right if both have a number and they agree."""
        said, announced = self.final(completion)
        right, _ = self.final(answer)
        close = said is not None and right is not None and self.agree(said, right)
        return Verdict(float(close), None if self.marker is None else float(announced))

    def agree(self, said: Fraction, right: Fraction) -> bool:
        """Equal, or nearly so where one of them is not whole."""
        if said.denominator == right.denominator == 1:
            return said == right
        return abs(said - right) <= Fraction(self.tolerance) * max(Fraction(1), abs(right))

    def final(self, text: str) -> tuple[Fraction | None, bool]:
        """The number that a text ends in, or the one behind the marker, and whether the marker announced one."""
        announced = list(self.marker.finditer(text)) if self.marker is not None else []
        if announced:
            behind = numbers(text[announced[-1].end() :])
            return (behind[0] if behind else None), bool(behind)
        found = numbers(text)
        return (found[-1] if found else None), False


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, exactly; a division by zero is none, nor is a number of more than 300 digits."""
    found = []
    for match in NUMBER.findall(text):
        if len(match) > DIGITS:
            continue
        top, _, bottom = match.replace(",", "").replace(" ", "").partition("/")
        if not bottom or int(bottom):
            found.append(Fraction(top) / int(bottom or 1))
    return found


def compiled(field: str, pattern: str) -> re.Pattern[str]:
    """A regular expression, or ValueError."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r} is no regular expression ({error}).") from error


class Regex:
    """What the pattern's last match holds is the answer; the format is a match.

    Args:
        pattern: of its groups the first that matched counts, without groups the whole match.
        ignore_case: in comparing with the answer.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    def __init__(self, pattern: str, ignore_case: bool = True):
        self.pattern, self.ignore_case = compiled("task.verifier.pattern", pattern), ignore_case

    def __call__(self, completion: str, answer: str) -> Verdict:
        """Right if the text that was found equals the answer, blanks apart."""
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
"""How a choice is announced; the first that occurs counts. "The answer is I think B" announces nothing."""


def choice(completion: str, answer: str) -> Verdict:
    """The letter that is chosen, A to J in capitals, is the answer's; the format is whether it is announced as the answer.

    Announced: <answer>B</answer>, \\boxed{B}, "the answer is (B)". Otherwise a completion that is a letter, or begins
    with one as in "B) because", still counts as right.
    """
    said, announced = chosen(completion)
    return Verdict(float(said is not None and said == chosen(answer)[0]), float(announced))


def chosen(text: str) -> tuple[str | None, bool]:
    """The letter that a text chooses, and whether it announces it."""
    for pattern in CHOICES:
        if found := pattern.findall(text):
            return found[-1], True
    bare = re.match(r"[*(\s]*([A-J])(?:[*).:]|\s*$)", text)
    return (bare.group(1) if bare else None), False


class Math:
    """Mathematically equal to the answer, as math-verify parses both (LaTeX, fractions, sets, intervals).

    The format is whether the completion has a \\boxed{...}.

    Args:
        seconds: for each comparison; whole seconds, for math-verify sets an alarm.

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
        """math-verify's verdict; what it cannot parse, or not in time, is wrong."""
        # Of bare LaTeX, math-verify would read the last number only; between dollars it reads the whole.
        gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        right, said = (self.library.parse(text, parsing_timeout=self.seconds) for text in (gold, completion))
        equal = self.library.verify(right, said, timeout_seconds=self.seconds)
        return Verdict(float(equal), float("\\boxed" in completion))


class Function:
    """A function of your own, called as function(completion, answer).

    Args:
        path: where it is, such as "my_package.scores.score".

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
        """What the function returns: a Verdict, a bool, or a score in [0, 1].

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
