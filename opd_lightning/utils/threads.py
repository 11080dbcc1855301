"""Threads that wait for other people's programs and servers. They are daemons: a program that ends does not wait for them."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from opd_lightning.utils.interrupts import interruptible


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
            with interruptible():
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


def submit_all(action: Callable[[Any], Any], items: Sequence[Any], workers: int) -> list[Future]:
    """The future results of an action on items, of which so many are begun at a time, in their order."""
    futures: list[Future] = [Future() for _ in items]
    waiting: SimpleQueue[tuple[Future, Any]] = SimpleQueue()
    for job in zip(futures, items, strict=True):
        waiting.put(job)
    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, args=(action, waiting), daemon=True).start()
    return futures


def work(action: Callable[[Any], Any], waiting: "SimpleQueue[tuple[Future, Any]]") -> None:
    """Take items until none is left; those whose future is cancelled are dropped."""
    while True:
        try:
            future, item = waiting.get_nowait()
        except Empty:
            return
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = action(item)
        except BaseException as error:  # whatever it is, it is raised where the result is awaited
            future.set_exception(error)
        else:
            future.set_result(result)


def results(futures: Sequence[Future]) -> list[Any]:
    """The results, in their order; at the first error, or a signal, those not begun are dropped."""
    try:
        with interruptible():
            return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
