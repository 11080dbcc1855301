"""Calls of other people's programs in threads, with a limit of time."""

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any


class Failed:
    """A call that raised or did not end in time; `text` says which in a few words."""

    def __init__(self, text: str):
        self.text = text


def call_all(calls: Sequence[Callable[[], Any]], seconds: float | None = None, workers: int = 64) -> list[Any]:
    """The results of calls that run side by side, in their order; a `Failed` where one raises or does not end in time.

    A call that does not end keeps its thread, which ends with the program: Python cannot stop it.

    Args:
        seconds: limit of each call; None waits.
        workers: calls at a time.
    """
    results: list[Any] = []
    for first in range(0, len(calls), workers):
        part = calls[first : first + workers]
        boxes: list[SimpleQueue[Any]] = [SimpleQueue() for _ in part]
        threads = [threading.Thread(target=run, args=(c, box), daemon=True) for c, box in zip(part, boxes, strict=True)]
        for thread in threads:
            thread.start()
        end = None if seconds is None else time.monotonic() + seconds  # of all, which began together
        for thread, box in zip(threads, boxes, strict=True):
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            results.append(box.get() if not box.empty() else Failed(f"no answer within {seconds:g} s"))
    return results


def run(call: Callable[[], Any], box: "SimpleQueue[Any]") -> None:
    """Put a call's result into the box, or its failure."""
    try:
        box.put(call())
    except BaseException as error:  # of a program of the user's, in a thread of its own: SystemExit too
        box.put(Failed(failure(error)))


def failure(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
