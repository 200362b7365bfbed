# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch

# glibc's largest threshold (DEFAULT_MMAP_THRESHOLD_MAX), without some room that PyTorch
# and glibc need for their own data.
_BLOCK = (32 << 20) - (64 << 10)


def keep_freed_memory() -> None:
    """Let the C library keep 64 MiB of freed memory, to use it again.

    glibc returns freed memory to the system beyond a threshold. The system clears every
    page before it hands it out again. On a CPU this takes a tenth of the time of MLLA-T
    on small images. glibc raises the threshold to twice the largest block that was
    freed, if the block has at most 32 MiB (``M_TRIM_THRESHOLD`` in mallopt(3)). So this
    function frees such a block. It is never written to and so takes no memory. Other C
    libraries are not affected.
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device='cpu')
