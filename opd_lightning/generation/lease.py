"""Leases: a run has its servers for itself among the runs of this machine, for each replaces their weights."""

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import getaddrinfo
from urllib.parse import urlsplit

from filelock import FileLock, Timeout


class Leases:
    """Locks that this process holds for servers; the system releases them when it ends, however it ends."""

    def __init__(self) -> None:
        self.locks: list[FileLock] = []

    def take(self, urls: Sequence[str]) -> None:
        """Take the servers.

        Raises:
            ValueError: another run of this machine has one of them.
        """
        for url in urls:
            lock = FileLock(lock_file(url), thread_local=False)
            try:
                lock.acquire(timeout=0)
                self.locks.append(lock)
            except Timeout as error:
                self.release()
                raise ValueError(
                    f"generator.urls: the server at {url} serves another run of this machine, whose weights this one would "
                    "replace; wait for that run, or give this one a server of its own."
                ) from error
            except (OSError, NotImplementedError):
                continue  # another user's file, or a file system without locks: the weight versions will tell

    def release(self) -> None:
        """Give the servers back; the files stay, for a run that finds one without its lock would lock another."""
        for lock in self.locks:
            lock.release()
        self.locks = []


def lock_file(url: str) -> str:
    """The file that is locked for a server, the same by any name of its host."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    with suppress(OSError):
        host = str(getaddrinfo(host, None)[0][4][0])
    host = "127.0.0.1" if host == "::1" else host
    digest = hashlib.blake2b(f"{host}:{parts.port}".encode(), digest_size=8).hexdigest()
    return str(Path(tempfile.gettempdir()) / f"opd-lightning-server-{digest}.lock")
