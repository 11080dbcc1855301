"""Objects in memory, which a configuration names by a path such as `memory://student/1`."""

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
