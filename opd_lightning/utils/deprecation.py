"""Deprecated names: each is accepted for one release, with one warning."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


@cache
def warn_once(sentence: str) -> None:
    """A warning, once per process."""
    log.warning(f"warning: {sentence}")


def warn(old: str, new: str) -> None:
    """Warn once that a name has moved."""
    warn_once(f"{old} is now {new}; the old name is read for one release.")


class RenamedAttribute:
    """A class's attribute by its old name: reads and sets the one of the new name.

    Args:
        new: the new name.
    """

    def __init__(self, new: str):
        self.new, self.old = new, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        """The value under the new name."""
        warn(self.old, self.new)
        return getattr(owner if instance is None else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        """Set the value under the new name."""
        warn(self.old, self.new)
        setattr(instance, self.new, value)


def rename_members(cls: type, names: Mapping[str, str]) -> None:
    """Give a class that defines members by old names the new ones; `names` has the new name of each old one.

    An old method stays, so that subclasses may call it.
    """
    for old, new in names.items():
        members = vars(cls)
        if old in members and new not in members:
            warn(f"{cls.__name__}.{old}", new)
            setattr(cls, new, members[old])
            if not callable(members[old]):
                delattr(cls, old)
        elif callable(members.get(new)):
            setattr(cls, old, members[new])
