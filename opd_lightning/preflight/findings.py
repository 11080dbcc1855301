"""Findings: what checks say, one line each."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        state: "pass", "warn" or "fail".
        text: what was found; for warn and fail with the remedy.
    """

    name: str
    state: str
    text: str


def raise_on_failures(found: Iterable[Finding]) -> list[str]:
    """What findings warn of, a sentence each.

    Raises:
        ValueError: all that fails.
    """
    told = [(finding.state, f"{finding.name}: {finding.text}") for finding in found]
    if failed := [text for state, text in told if state == "fail"]:
        raise ValueError(" ".join(failed))
    return [text for state, text in told if state == "warn"]
