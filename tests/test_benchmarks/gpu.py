# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch

#: Marks of what a machine without a GPU skips.
ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
)


def needs_gpu(test):
    """Mark a test that a machine without a GPU skips."""
    gpu, skipped = ON_GPU
    return gpu(skipped(test))
