# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What tests on the pretended CUDA device share."""

import contextlib

import pytest
import torch

from benchmarks.pretended_cuda import AVAILABLE
from mlla_mm.ops import triton

#: Marks of a test, or of a module of tests.
needs_pretended_cuda = pytest.mark.skipif(
    not AVAILABLE,
    reason='needs torch._C._ensureCUDADeviceGuardSet, which old PyTorch lacks',
)
needs_triton = pytest.mark.skipif(not triton._has_triton(), reason='needs Triton 3.3')

#: Values of MLLA_OPS on the device.
OPS = ['naive', 'eager', pytest.param('fused', marks=needs_triton)]


def autocast(dtype):
    """Autocast on CUDA to the dtype of a name; none for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast('cuda', getattr(torch, dtype))


def describe(tensors):
    """Shapes, dtypes and strides. The stride of an axis of length 1 means nothing."""
    return [
        (x.shape, x.dtype, [s for n, s in zip(x.shape, x.stride()) if n > 1])
        for x in tensors
    ]
