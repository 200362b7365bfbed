# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import platform
import subprocess
import sys

import pytest

# Three blocks of 12 MiB, more than glibc keeps by itself once one was freed.
_SCRIPT = """
import resource
import torch
from mlla_mm.utils.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(12 << 20, dtype=torch.uint8) for _ in range(3)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
by_itself = faults()
keep_freed_memory()
for _ in range(5):  # until the blocks have their places
    faults()
print(by_itself, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc alone')
def test_freed_memory_is_used_again():
    """The system need not hand out pages anew."""
    output = subprocess.run(
        [sys.executable, '-c', _SCRIPT], capture_output=True, text=True, check=True
    )
    by_itself, kept = map(int, output.stdout.split()[-2:])
    assert kept < 0.1 * by_itself
