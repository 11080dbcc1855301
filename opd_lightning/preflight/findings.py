"""Findings: the results of checks, one line each."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the check's table.

    Attributes:
        name: the checked part.
        state: "pass", "warn" or "fail".
        text: the result; for warn and fail with the remedy.
    """

    name: str
    state: str
    text: str


def raise_on_failures(findings: Iterable[Finding]) -> list[str]:
    """The warnings among findings, a sentence each.

    Raises:
        ValueError: the texts of all failures.
    """
    messages = [(finding.state, f"{finding.name}: {finding.text}") for finding in findings]
    if failed := [text for state, text in messages if state == "fail"]:
        raise ValueError(" ".join(failed))
    return [text for state, text in messages if state == "warn"]
