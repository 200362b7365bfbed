# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch

# The largest block that raises glibc's thresholds (DEFAULT_MMAP_THRESHOLD_MAX), without
# room for the bookkeeping of both libraries.
_BLOCK = (32 << 20) - (64 << 10)


def keep_freed_memory() -> None:
    """Let the C library keep 64 MiB of freed memory for what is computed next.

    glibc returns freed memory to the system beyond a threshold, and the system clears
    each page that it hands out again: a tenth of the time of MLLA-T on small images on
    a CPU. The threshold grows with the blocks that a program has freed, to twice the
    largest one of at most 32 MiB (``M_TRIM_THRESHOLD`` in mallopt(3)). So this frees
    such a block. Nothing was written to it, so it never was in memory. Other C
    libraries are not affected.
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device='cpu')
