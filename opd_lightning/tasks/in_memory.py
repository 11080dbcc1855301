"""Tasks from objects in memory: rows of lists and data sets, and a verifier that is a function."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opd_lightning.tasks.rows import Row
from opd_lightning.types import Example, Verdict


class FunctionVerifier:
    """The verifier by a function of the example and the completion's text.

    Args:
        function: returns a Verdict, a bool, or a score in [0, 1]; `example.extra` has the row's texts and numbers by column.
    """

    reads_example = True

    def __init__(self, function: Callable[[Example, str], Any]):
        if not callable(function):
            raise ValueError(f"verify={function!r} is no function; give one of (example, text).")
        self.function, self.partial_scores = function, getattr(function, "partial_scores", False)

    def __call__(self, example: Example, text: str) -> Verdict:
        """The function's result as a verdict.

        Raises:
            ValueError: it raises, or returns something else.
        """
        name = getattr(self.function, "__name__", type(self.function).__name__)
        try:
            score = self.function(example, text)
            verdict = score if isinstance(score, Verdict) else Verdict(float(score))
        except Exception as error:
            raise ValueError(
                f"verify={name} raised {type(error).__name__} ({error}) on example {example.id}, text={text[:80]!r}; it must "
                "return a bool, a score or a Verdict for any text."
            ) from error
        if not 0.0 <= verdict.content <= 1.0:
            raise ValueError(f"verify={name} returned {verdict.content}; scores must lie in [0, 1].")
        return verdict


def rows_of(data: Iterable[Any], argument: str) -> list[Row]:
    """Rows of a list of prompts, chats or rows, or of a data set.

    Args:
        argument: the name of the argument, for errors.

    Raises:
        ValueError: there are no rows, or one is of no known kind.
    """
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, data))
        raise ValueError(f"{argument} is a mapping of {splits or 'nothing'}; give one split or a list of rows.")
    if not isinstance(data, Iterable):
        raise ValueError(
            f"{argument}={type(data).__name__} holds no rows; give a list, a datasets.Dataset, a path or a hub id."
        )
    values = list(data)
    if not values:
        raise ValueError(f"{argument} is empty; give at least one row.")
    first = values[0]
    if isinstance(first, Mapping) and ({"role", "content"} <= set(first) or {"from", "value"} <= set(first)):
        raise ValueError(f"{argument} is one chat; give a list of chats, [[{{'role': ..., 'content': ...}}, ...], ...].")
    return [row_of(value, f"{argument}:{number}") for number, value in enumerate(values, start=1)]


def row_of(value: Any, place: str) -> Row:
    """A row of a prompt (text or a list of turns) or of a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str | list | tuple):
        return {"prompt": list(value) if isinstance(value, tuple) else value}
    raise ValueError(f"{place} is {type(value).__name__}; give a text, a list of turns, or a row as a dict.")
