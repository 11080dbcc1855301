"""Freed memory is kept for the next step, and given back behind the last one."""

import ctypes
import subprocess
import sys

import pytest

from opd_lightning.utils import freed_memory

COUNT = """
import ctypes
import resource
from opd_lightning.utils import freed_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = ctypes.c_void_p(library.malloc(80_000_000))
        library.memset(block, 1, 80_000_000)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

usual = faults()
freed_memory.keep("cuda")
assert faults() > usual // 2, "a GPU's host is left alone"
freed_memory.keep("cpu")
faults()
assert faults() < usual // 100
kept = resident()
freed_memory.give_back()
assert resident() < kept - 15_000 and faults() > usual // 2
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_pages_are_asked_for_once():
    subprocess.run([sys.executable, "-c", COUNT], check=True)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    freed_memory.keep("cpu")
    freed_memory.give_back()
