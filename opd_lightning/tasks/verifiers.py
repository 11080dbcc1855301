"""Verifiers: is a completion right? Each is called as verifier(completion, answer), two texts, and returns a `Verdict`.

The answer is the data set's; where the reference solution ends in it ("... #### 72", "... \\boxed{72}") it is looked for
in the answer just as in the completion. A verifier of your own may return a bool or a score in [0, 1] instead.
"""

import re
from collections.abc import Callable
from typing import Any

from opd_lightning.names import find
from opd_lightning.tasks.base import Verdict

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")


def exact(completion: str, answer: str, ignore_case: bool = True) -> Verdict:
    """The whole completion is the answer, blanks apart."""
    said, right = " ".join(completion.split()), " ".join(answer.split())
    return Verdict(float(said.lower() == right.lower() if ignore_case else said == right))


def numeric(completion: str, answer: str, marker: str | None = None, tolerance: float = 1e-6) -> Verdict:
    """The last number of the completion is that of the answer.

    Args:
        marker: a regular expression that announces the final number, such as "####" or "answer is"; where it occurs, the
            first number behind its last occurrence counts, and the format is whether it occurs.
        tolerance: largest relative difference (absolute below 1).
    """
    said, announced = last_number(completion, marker)
    right, _ = last_number(answer, marker)
    close = said is not None and right is not None and abs(said - right) <= tolerance * max(1.0, abs(right))
    return Verdict(float(close), None if marker is None else float(announced))


def last_number(text: str, marker: str | None) -> tuple[float | None, bool]:
    """The number that a text ends in, or the one behind the marker, and whether the marker was there."""
    announced = list(re.finditer(marker, text)) if marker is not None else []
    if announced:
        behind = numbers(text[announced[-1].end() :])
        return (behind[0] if behind else None), bool(behind)
    found = numbers(text)
    return (found[-1] if found else None), False


def numbers(text: str) -> list[float]:
    """All numbers of a text; commas between groups of three digits are read over."""
    return [float(match.replace(",", "")) for match in NUMBER.findall(text) if match]


def regex(completion: str, answer: str, pattern: str, ignore_case: bool = True) -> Verdict:
    """What the pattern's last match holds (its first group, if it has one) is the answer; the format is a match."""
    matches = list(re.finditer(pattern, completion, re.DOTALL))
    if not matches:
        return Verdict(0.0, 0.0)
    last = matches[-1]
    said = last.group(1) if last.re.groups else last.group(0)
    return Verdict(exact(said or "", answer, ignore_case).content, 1.0)


CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        r"<answer>\s*\(?([A-J])\)?[.:]?\s*</answer>",
        r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?",
        r"(?i:answer|option|choice)(?:\s+(?i:is))?\s*[:=]?\s*\**\(?([A-J])\)?(?![A-Za-z])",
    )
)
"""How a choice is announced; the first that occurs counts."""


def choice(completion: str, answer: str) -> Verdict:
    """The letter that is chosen, A to J, is the answer's; the format is whether it is announced as the answer.

    Announced: <answer>B</answer>, \\boxed{B}, "the answer is (B)". Otherwise a completion that is a letter, or begins
    with one as in "B) because", still counts as right.
    """
    right = answer.strip().strip("().").upper()[:1]
    for pattern in CHOICES:
        if found := pattern.findall(completion):
            return Verdict(float(found[-1] == right), 1.0)
    bare = re.match(r"\s*\(?([A-J])(?:[).:]|\s*$)", completion)
    return Verdict(float(bare is not None and bare.group(1) == right), 0.0)


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
        ValueError: it cannot be imported.
    """

    def __init__(self, path: str):
        try:
            self.function: Callable[[str, str], Any] = find(path)
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
