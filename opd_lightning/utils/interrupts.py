"""Interrupts: a signal at which a run stops ends a wait for servers and the like at once; the run's own work is finished."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread


class Interrupted(KeyboardInterrupt):
    """A wait that a signal ended. What the run holds is that of its last update."""


class Waits:
    """The waits of the main thread.

    Attributes:
        depth: how many are open, one inside of another.
        asked: says whether they are to end; None lets them be.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.asked: Callable[[], bool] | None = None


WAITS = Waits()


def end_waits_when(asked: Callable[[], bool] | None) -> None:
    """Set what says whether waits are to end; None lets them be."""
    WAITS.depth, WAITS.asked = 0, asked


def end_waits() -> None:
    """Raise `Interrupted` if a wait is open and is to end. A signal handler calls it: handlers run in the main thread."""
    if WAITS.depth and WAITS.asked is not None and WAITS.asked():
        raise Interrupted


@contextmanager
def interruptible() -> Iterator[None]:
    """A context that only waits, so that `end_waits` may leave it at any point; in other threads it changes nothing."""
    if current_thread() is not main_thread():
        yield
        return
    WAITS.depth += 1
    try:
        end_waits()
        yield
    finally:
        WAITS.depth = max(WAITS.depth - 1, 0)
