"""Objects in memory, which a configuration names by a path such as `memory://student/1`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

SCHEME = "memory://"
NUMBERS = count(1)


class Held:
    """An object with the path that names it, for as long as this holder is kept.

    Args:
        value: the object.
        label: its part in a run, such as "student"; the first part of the path.
    """

    def __init__(self, value: Any, label: str):
        self.value, self.path = value, f"{SCHEME}{label}/{next(NUMBERS)}"
        HOLDERS[self.path] = self


HOLDERS: "WeakValueDictionary[str, Held]" = WeakValueDictionary()


def holder(path: str) -> Held:
    """The holder at a path.

    Raises:
        ValueError: there is none in this process.
    """
    try:
        return HOLDERS[path]
    except KeyError as error:
        raise ValueError(
            f"{path} names an object in the memory of another program; give a folder, a file or a hub id."
        ) from error


def held(path: str, **_: Any) -> Any:
    """The object at a path: the target of nodes that stand for an object in memory; only the configuration reads other keys."""
    return holder(path).value


def label_of(path: str) -> str:
    """The label in a path."""
    return path.removeprefix(SCHEME).partition("/")[0]


NAMED = re.compile(rf"([\w.]+=)?{SCHEME}(\w+)/\d+")
"""A path in memory in a sentence, with the key that has it."""


def in_python(sentence: str) -> str:
    """A sentence on the configuration in the words of who wrote Python: arguments in the place of paths in memory."""
    named = NAMED.sub(lambda found: "teacher" if (found[1] or "").startswith("teacher.") else found[2], sentence)
    return named.replace("on the command line", "in overrides")


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Errors within name arguments, see `in_python`."""
    try:
        yield
    except ValueError as error:
        if (sentence := in_python(str(error))) != str(error):
            raise ValueError(sentence) from error
        raise
