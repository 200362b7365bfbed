# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Fused Triton kernels of the ops in :mod:`mlla_mm.ops.naive`, forward and backward.

Triton need not be installed, and importing this package does not import it. Before
calling an op, ask the function ``supports_...`` of the op.

The kernels compute in float32, whatever the dtype of their inputs and outputs. They add
up partial sums in a fixed order, without atomics, so that every run has the same
result. There are gradients of first order only.
"""

import functools
import os
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ...compat.pytorch import constant_when_compiled

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The first version that compiles kernels in which a loop builds a tuple. It comes with
# PyTorch 2.7.
_MIN_TRITON = (3, 3)

# Ampere, whose tensor cores are the first with TF32 and bfloat16.
_MIN_CAPABILITY = (8, 0)

# A program holds a whole head and its state in registers.
_MAX_HEAD_DIMS = 64

# A program holds a whole row of LayerNorm.
_MAX_CHANNELS = 2048

# CUDA's limit for the axis of the grid that counts images.
_MAX_IMAGES = 65535


@constant_when_compiled
def is_available(device: torch.device) -> bool:
    """Whether kernels can run on a device.

    Args:
        device (torch.device): Device of the tensors.

    Returns:
        bool: True for an NVIDIA GPU of compute capability 8.0 or more, with Triton 3.3
        or newer. True for the CPU, with such a Triton, if ``TRITON_INTERPRET=1`` was in
        the environment before the first kernel was used. Triton then interprets the
        kernels, which is slow and meant for tests.
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
    """Whether :func:`depthwise_conv` supports these tensors.

    The kernels must be available on the device. The map must have 1 to 65535 images and
    must not be empty. Every tensor must be float32, float16 or bfloat16.
    """
    return _fit(x, weight, bias)


def supports_mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> bool:
    """Whether :func:`mlla_attention` supports these tensors.

    The conditions are those of :func:`supports_depthwise_conv`, and two more: the
    number of channels is a multiple of four (half of the pairs of channels rotate by
    row), and a head has an even number of channels, at most 64.
    """
    return _heads_fit(v.shape[-1], num_heads) and _fit(v, qk, gate, weight, bias)


def _heads_fit(channels: int, num_heads: int) -> bool:
    head_dims = channels // num_heads
    return channels % 4 == 0 and head_dims % 2 == 0 and head_dims <= _MAX_HEAD_DIMS


def _fit(*tensors: Tensor) -> bool:
    device = tensors[0].device
    return (
        all(t.dtype in _DTYPES and t.device == device for t in tensors)
        and tensors[0].numel() > 0
        and tensors[0].shape[0] <= _MAX_IMAGES
        and is_available(device)
    )


def supports_linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether :func:`linear_relu` supports these tensors.

    The conditions are those of :func:`supports_depthwise_conv`, and at most 8192 output
    channels.
    """
    return len(weight) <= 4 * _MAX_CHANNELS and _fit(x, weight, bias)


def supports_expand_and_halve(
    x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor
) -> bool:
    """Whether :func:`expand_and_halve` supports these tensors.

    The conditions are those of :func:`supports_linear_relu`, and the map must have an
    even number of rows and of columns.
    """
    return (
        x.shape[1] % 2 == x.shape[2] % 2 == 0
        and supports_linear_relu(x, weight, bias)
        and _fit(x, taps, conv_bias)
    )


def supports_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
) -> bool:
    """Whether :func:`batch_norm` supports these tensors.

    The conditions are those of :func:`supports_depthwise_conv`, at most 2048 channels,
    and that gradients are disabled.
    """
    return (
        not torch.is_grad_enabled()
        and x.shape[1] <= _MAX_CHANNELS
        and _fit(x, mean, var, weight, bias)
    )


def supports_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether :func:`layer_norm` supports these tensors.

    The conditions are those of :func:`supports_depthwise_conv`, and at most 2048
    channels.
    """
    return x.shape[-1] <= _MAX_CHANNELS and _fit(x, weight, bias)


def supports_mlla_block(
    x: Tensor, parameters: Sequence[Optional[Tensor]], num_heads: int
) -> bool:
    """Whether :func:`mlla_block` supports these tensors.

    The conditions are those of :func:`supports_mlla_attention` and
    :func:`supports_layer_norm`. The parameters must have the shapes of a block's
    parameters. Only the bias of ``qk`` may be None.
    """
    channels = x.shape[-1]
    if not _heads_fit(channels, num_heads) or channels > _MAX_CHANNELS:
        return False
    hidden = -1 if parameters[20] is None else len(parameters[20])
    tensors = [x]
    for i, (t, shape) in enumerate(zip(parameters, _block_shapes(channels, hidden))):
        if t is not None and t.shape == shape:
            tensors.append(t)
        elif t is not None or i != 11:
            return False
    return _fit(*tensors)


@functools.lru_cache
def _block_shapes(channels: int, hidden: int) -> Tuple[Tuple[int, ...], ...]:
    """Shapes of the weight and bias of each layer of a block, in order."""
    map_, vector, square = (channels, 1, 3, 3), (channels,), (channels, channels)
    return (
        (map_, vector, vector, vector, square, vector, square, vector, map_, vector)
        + ((2 * channels, channels), (2 * channels,), map_, vector, square, vector)
        + (map_, vector, vector, vector)
        + ((hidden, channels), (hidden,), (channels, hidden), vector)
    )


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """:func:`mlla_mm.ops.naive.depthwise_conv` in one kernel. Contiguous."""
    from ._depthwise_conv import DepthwiseConv

    return DepthwiseConv.apply(x, weight, bias, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """:func:`mlla_mm.ops.naive.mlla_attention` in three passes over the tokens.

    ``qk``, ``v`` and ``gate`` may be some channels of wider maps. The output is
    contiguous.
    """
    from ._mlla_attention import MLLAAttention

    return MLLAAttention.apply(qk, v, gate, weight, bias, num_heads)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`mlla_mm.ops.naive.layer_norm` in one kernel. Contiguous."""
    from ._layer_norm import LayerNorm

    return LayerNorm.apply(x, weight, bias, eps)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`mlla_mm.ops.naive.linear_relu` in one kernel, with gradients."""
    from ._linear import LinearReLU

    return LinearReLU.apply(x, weight, bias)


def expand_and_halve(
    x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor
) -> Tensor:
    """:func:`mlla_mm.ops.naive.expand_and_halve` in two kernels. Contiguous."""
    from . import _merging

    tensors = x, weight, bias, taps, conv_bias
    if torch.is_grad_enabled():
        return _merging.ExpandAndHalve.apply(*tensors)
    return _merging.forward(*tensors)[0]


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: bool,
) -> Tensor:
    """:func:`mlla_mm.ops.naive.batch_norm` in one kernel, without gradients."""
    from ._batch_norm import batch_norm

    return batch_norm(x, mean, var, weight, bias, eps, act)


def mlla_block(
    x: Tensor,
    parameters: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: Tuple[float, float],
    scales: Tuple[Optional[Tensor], Optional[Tensor]],
    merged: bool = False,
) -> Tensor:
    """A whole :class:`mlla_mm.models.layers.MLLABlock`.

    Args:
        x (Tensor): (N, H, W, C).
        parameters (Sequence[Tensor | None]): Weight and bias of each layer of the
            block, in order.
        num_heads (int): Number of attention heads.
        eps (tuple[float, float]): ``eps`` of both LayerNorms.
        scales (tuple[Tensor | None, Tensor | None]): Factors of stochastic depth for
            the two branches of each image, (N,) in float32. None means 1.
        merged (bool): Also take the kernels of several layers, which were not measured
            on a GPU. Defaults to False.

    Returns:
        Tensor: (N, H, W, C), the dtype of ``x`` promoted with that of the products.
    """
    from . import _block

    x = x.contiguous()
    if torch.is_grad_enabled():
        return _block.MLLABlock.apply(x, num_heads, eps, scales, merged, *parameters)
    weights = _block.Weights._make(parameters)
    return _block.forward(x, num_heads, eps, scales, weights, False, merged)[0]
