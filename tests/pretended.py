# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What tests on the pretended CUDA device share."""

import contextlib

import pytest
import torch

from benchmarks.pretended_cuda import AVAILABLE

#: Marks of a test, or of a module of tests.
needs_pretended_cuda = pytest.mark.skipif(
    not AVAILABLE,
    reason='pretending a GPU needs PyTorch 2.4, whose copies ask no driver',
)


def autocast(dtype):
    """Autocast on CUDA to the dtype of a name; none for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast('cuda', getattr(torch, dtype))
