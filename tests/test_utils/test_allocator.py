# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import platform
import subprocess
import sys

import pytest

# Prints whether a freed block of 20 MiB stays with the process: before, and after the
# call. What is mapped into memory for itself alone goes back to the system.
_SCRIPT = """
import ctypes
import torch
from mlla_mm.utils.allocator import keep_freed_memory

class Memory(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int) for name in
        'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'
        .split()
    ]

c = ctypes.CDLL(None)
c.mallinfo.restype = Memory

def stays():
    mapped = c.mallinfo().hblks
    block = torch.empty(20 << 20, dtype=torch.uint8)
    return c.mallinfo().hblks == mapped

by_itself = stays()
keep_freed_memory()
print(by_itself, stays())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc alone')
def test_freed_memory_is_used_again():
    # Now and then an import has freed such a block before.
    for _ in range(5):
        output = subprocess.run(
            [sys.executable, '-c', _SCRIPT], capture_output=True, text=True, check=True
        )
        by_itself, after = output.stdout.split()[-2:]
        assert after == 'True'
        if by_itself == 'False':
            return
    pytest.fail('freed memory stays by itself')
