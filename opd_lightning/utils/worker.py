"""Worker: a thread that does jobs in their order, and tells how long it was busy."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch


class Worker:
    """A thread that does jobs in the order in which they are given. After a job that fails none is done.

    It is a daemon and starts with the first job: a program that is interrupted does not wait for it.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self.name = name
        self.jobs: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self.given: list[Future] = []
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None
        self.lock = threading.Lock()
        self.spent = 0.0
        self.begun: float | None = None

    def submit(self, job: Callable[[], Any]) -> Future:
        """Give a job; its result, or the error that it raised, is the future's."""
        if self.thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # a thread has its own
            self.thread = threading.Thread(target=self.run, args=(device,), name=self.name, daemon=True)
            self.thread.start()
        future: Future = Future()
        self.given = [*(earlier for earlier in self.given if not earlier.done()), future]
        self.jobs.put((future, job))
        return future

    def run(self, device: int | None) -> None:
        """Do jobs until None comes."""
        if device is not None:
            torch.cuda.set_device(device)
        while (item := self.jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self.failed is not None:
                    raise self.failed
                with self.working():
                    result = job()
            except BaseException as error:  # whatever it is, it is raised where the result is awaited
                self.failed = error
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, future, job  # a waiting thread keeps no batch alive

    def wait(self) -> None:
        """Wait until all jobs are done; the first error is raised."""
        for future in self.given:
            future.exception()
        self.given = []
        if self.failed is not None:
            raise self.failed

    def close(self, seconds: float = 5.0) -> None:
        """Drop the jobs that are not begun, and wait some seconds for the one that is."""
        for future in self.given:
            future.cancel()
        self.jobs.put(None)
        if self.thread is not None:
            self.thread.join(seconds)
        self.given, self.thread = [], None

    @contextmanager
    def working(self) -> Iterator[None]:
        """A context whose time counts as the worker's."""
        with self.lock:
            self.begun = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.spent += time.perf_counter() - self.begun
                self.begun = None

    def busy_seconds(self) -> float:
        """The time spent on jobs so far."""
        with self.lock:
            return self.spent + (0.0 if self.begun is None else time.perf_counter() - self.begun)
