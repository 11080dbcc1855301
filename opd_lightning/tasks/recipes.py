"""Functions for public data sets beyond a column mapping: reshaped rows, and comparison of tool calls.

Each `prepare` function maps a row of one data set to a row with flat text columns, or to None to leave it out.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.tasks.rows import Row
from opd_lightning.types import Verdict

LETTERS = "ABCDEFGHIJ"


def boxed_only(row: Row, column: str = "solution") -> Row | None:
    """Leave out rows whose solution has no \\boxed answer to compare with (a few of MATH and OpenThoughts)."""
    return row if "\\boxed" in str(row.get(column)) else None


def deep_math(row: Row) -> Row | None:
    """A row of DeepMath-103K with MATH's column names; a row of MATH as it is. Rows without a boxed solution are left out."""
    if "question" in row:
        row = {"problem": row["question"], "solution": row.get("r1_solution_1")}
    return boxed_only(row)


def science(row: Row, domain: str = "Chemistry", level: str = "L3", kinds: Sequence[str] = ("mcq-4-choices",)) -> Row | None:
    """A multiple-choice question of SciKnowEval (arXiv 2406.09098) with its options as lines; others are left out.

    Args:
        domain, level: the part to keep; SDFT and SDPO train on Chemistry, level L3.
        kinds: the data set's `type` of the questions to keep.
    """
    details = row.get("details") or {}
    if row.get("domain") != domain or details.get("level") != level or row.get("type") not in kinds:
        return None
    options = row["choices"]["text"]
    lines = "\n".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options, strict=False))
    return {"question": f"{row['question']}\n\n{lines}", "answer": row["answerKey"]}


def tool_use(row: Row) -> Row:
    """A row of ToolAlpaca from SDFT's authors, with the first golden response and the golden calls as JSON."""
    responses = row.get("golden_response")
    calls = row["golden_answer"]
    if isinstance(calls, Mapping):  # some copies store a table of columns instead of a list of calls
        calls = [dict(zip(calls, values, strict=True)) for values in zip(*calls.values(), strict=True)]
    return {
        "prompt": row["prompt"],
        "response": responses[0] if isinstance(responses, list) and responses else responses,
        "calls": json.dumps([{"Action": c["Action"], "Action_Input": arguments(c["Action_Input"])} for c in calls]),
    }


def arguments(raw: Any) -> dict[str, Any]:
    """The arguments of a golden call, from an object or its JSON; empty for an empty value.

    Raises:
        ValueError: it is neither.
    """
    parsed = json.loads(raw) if isinstance(raw, str) and raw.strip() else (raw or {})
    if not isinstance(parsed, dict):
        raise ValueError(f"Action_Input is {raw!r}, not an object")
    return parsed


def tool_calls(completion: str, answer: str) -> Verdict:
    """The verdict on tool calls: the same tools equally often, with the same merged arguments (SDFT, arXiv 2601.19897).

    Calls are written "Action: name" and "Action Input: {...}", in any order. JSON is read to its closing brace,
    so that nested arguments count too (the authors' pattern stops at the first brace). The format is at least one call whose
    arguments can be read.

    Args:
        answer: a JSON list of {"Action", "Action_Input"}, the input an object, as `tool_use` writes it.
    """
    right = json.loads(answer)
    expected = Counter(call["Action"] for call in right)
    names, inputs = calls_of(completion)
    content = names == expected and merged(inputs) == merged(call["Action_Input"] for call in right)
    return Verdict(float(content), float(bool(names) and bool(inputs)))


def calls_of(completion: str) -> tuple[Counter[str], list[Any]]:
    """The counts of tools in a completion's calls, and the arguments that can be parsed."""
    names = Counter(re.findall(r"Action:\s*(\w+)", completion))
    inputs = []
    for match in re.finditer(r"Action Input:\s*(?=\{)", completion):
        try:
            inputs.append(json.JSONDecoder().raw_decode(completion, match.end())[0])
        except (ValueError, RecursionError):
            continue
    return names, inputs


def merged(inputs: Any) -> dict[str, Any]:
    """All arguments in one mapping."""
    return {key: value for arguments in inputs for key, value in arguments.items()}
