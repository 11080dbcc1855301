"""Check results: the outcome of each check, one line each."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckResult:
    """One line of the check's table.

    Attributes:
        name: the checked part.
        state: "pass", "warn" or "fail".
        text: the result; for warn and fail with the remedy.
    """

    name: str
    state: str
    text: str


def raise_on_failures(results: Iterable[CheckResult]) -> list[str]:
    """The warnings among results, a sentence each.

    Raises:
        ValueError: the texts of all failures.
    """
    messages = [(result.state, f"{result.name}: {result.text}") for result in results]
    if failed := [text for state, text in messages if state == "fail"]:
        raise ValueError(" ".join(failed))
    return [text for state, text in messages if state == "warn"]
