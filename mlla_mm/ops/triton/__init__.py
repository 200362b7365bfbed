# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Fused Triton kernels of the ops in :mod:`mlla_mm.ops.naive`, forward and backward.

Importing this package does not import Triton, which need not be installed: ask
:func:`supports_depthwise_conv` or :func:`supports_mlla_attention` before the op itself.

The kernels compute in float32 whatever they read and write, and add up partial sums in
a fixed order, without atomics, so that a result is the same in every run. Gradients are
of first order.
"""

import functools
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The first that compiles kernels with tuples made in a loop; PyTorch 2.7 brings it.
_MIN_TRITON = (3, 3)

# The tensor cores compute with TF32 and bfloat16 from Ampere on.
_MIN_CAPABILITY = (8, 0)

# A program holds a whole head, and its state, in registers.
_MAX_HEAD_DIMS = 64

# The images are an axis of the grid.
_MAX_IMAGES = 65535


def is_available(device: torch.device) -> bool:
    """Whether kernels can run on a device.

    Args:
        device (torch.device): Device of the tensors.

    Returns:
        bool: True for an NVIDIA GPU of compute capability 8.0 or more with Triton 3.3
        or newer; for the CPU if, besides, ``TRITON_INTERPRET=1`` was in the environment
        before the first kernel was used. Triton then interprets the kernels, which is
        meant for tests: it is slow.
    """
    if device.type == 'cpu':
        return os.environ.get('TRITON_INTERPRET') == '1' and _has_triton()
    if device.type != 'cuda' or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY and _has_triton()


@functools.cache
def _has_triton() -> bool:
    try:
        import triton
    except ImportError:
        return False
    major, minor = triton.__version__.split('.')[:2]
    return (int(major), int(minor)) >= _MIN_TRITON


def supports_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether :func:`depthwise_conv` can take these tensors.

    That is, whether the kernels are available on the device, the map is not empty and
    has at most 65535 images, and every tensor is float32, float16 or bfloat16.
    """
    return _fit(x, weight, bias)


def supports_mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> bool:
    """Whether :func:`mlla_attention` can take these tensors.

    That is what :func:`supports_depthwise_conv` asks for, and heads of an even number
    of channels (the rotation acts on pairs), at most 64.
    """
    head_dims = v.shape[-1] // num_heads
    return (
        head_dims % 2 == 0
        and head_dims <= _MAX_HEAD_DIMS
        and _fit(v, qk, gate, weight, bias)
    )


def _fit(*tensors: Tensor) -> bool:
    device = tensors[0].device
    return (
        all(t.dtype in _DTYPES and t.device == device for t in tensors)
        and tensors[0].numel() > 0
        and tensors[0].shape[0] <= _MAX_IMAGES
        and is_available(device)
    )


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """:func:`mlla_mm.ops.naive.depthwise_conv` in one kernel, contiguous."""
    from ._depthwise_conv import DepthwiseConv

    return DepthwiseConv.apply(x, weight, bias, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """:func:`mlla_mm.ops.naive.mlla_attention` in two passes over the tokens.

    ``qk``, ``v`` and ``gate`` may be slices of wider maps along the channels; the
    output is contiguous.
    """
    from ._mlla_attention import MLLAAttention

    return MLLAAttention.apply(qk, v, gate, weight, bias, num_heads)
