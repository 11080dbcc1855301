"""Temporary folders that do not outlive a killed process for long: the next one on the machine removes them."""

import os
import shutil
import socket
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


class ScratchFolder:
    """A new folder of this process, removed by `close` or at exit. A lock beside it says that its process lives.

    Those of the same prefix, user and machine whose process was killed are removed first.

    Args:
        prefix: of its name, such as "opd-lightning-weights-".
        parent: the folder that it is made in; None takes the system's for temporary files, where only this user sees it.

    Attributes:
        path: the folder.
    """

    def __init__(self, prefix: str, parent: Path | None = None):
        place = Path(tempfile.gettempdir()) if parent is None else parent
        place.mkdir(parents=True, exist_ok=True)
        prefix = f"{prefix}{socket.gethostname()}-"  # locks may be unknown to other machines
        remove_abandoned(place, prefix)
        self.path = (place / f"{prefix}{uuid4().hex[:12]}").resolve()
        lock = lock_of(self.path)
        with suppress(OSError, NotImplementedError):  # a file system without locks: nothing is removed later
            lock.acquire(timeout=0)
        self.path.mkdir(mode=0o700 if parent is None else 0o777)
        self.close = weakref.finalize(self, remove, self.path, lock)


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder, not held yet."""
    return FileLock(f"{folder}.lock", thread_local=False)


def remove(folder: Path, lock: FileLock) -> None:
    """Remove a folder and its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def remove_abandoned(place: Path, prefix: str) -> None:
    """Remove the folders of a prefix that are this user's and whose lock no process holds; one without a lock stays."""
    for folder in place.glob(f"{prefix}*"):
        file = Path(f"{folder}.lock")
        if folder.is_symlink() or not folder.is_dir() or file.is_symlink() or not file.is_file():
            continue
        lock = lock_of(folder)
        with suppress(Timeout, OSError, NotImplementedError):
            if folder.stat().st_uid != getattr(os, "getuid", lambda: 0)():
                continue
            lock.acquire(timeout=0)
            remove(folder, lock)
