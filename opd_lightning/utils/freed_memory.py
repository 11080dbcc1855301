"""Memory that a step frees, kept for the next one: the C library gives large blocks back to the system by itself.

Every step would ask for the same pages again, and the system clears each: a fifth of an update on a CPU.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**31 - 1
"""Bytes; mallopt takes an int."""
USUAL = 2**17
"""glibc's own threshold for both."""


def keep(device: str) -> None:
    """Keep freed memory from now on, where models compute on a CPU and the C library is glibc."""
    if device == "cpu":
        _set(LARGEST)


def give_back() -> None:
    """Give freed memory back to the system, now and from now on."""
    if _set(USUAL):
        ctypes.CDLL(None).malloc_trim(0)


def _set(threshold: int) -> bool:
    """Set from how many bytes on freed memory is given back; whether the C library can."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another library may have a mallopt with other numbers
        return bool(library.mallopt(MMAP_THRESHOLD, threshold) and library.mallopt(TRIM_THRESHOLD, threshold))
    except (OSError, AttributeError, TypeError):
        return False
