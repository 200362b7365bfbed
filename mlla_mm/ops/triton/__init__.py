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
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The first that compiles kernels with tuples made in a loop; PyTorch 2.7 brings it.
_MIN_TRITON = (3, 3)

# The tensor cores compute with TF32 and bfloat16 from Ampere on.
_MIN_CAPABILITY = (8, 0)

# A program holds a whole head, and its state, in registers.
_MAX_HEAD_DIMS = 64

# A program holds a whole row of LayerNorm.
_MAX_CHANNELS = 2048

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

    That is what :func:`supports_depthwise_conv` asks for, a multiple of four channels
    (half of their pairs rotate by row), and heads of an even number, at most 64.
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
    """As :func:`supports_depthwise_conv`, and for at most 8192 output channels."""
    return len(weight) <= 4 * _MAX_CHANNELS and _fit(x, weight, bias)


def supports_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
) -> bool:
    """Whether :func:`batch_norm` can take these tensors.

    That is what :func:`supports_depthwise_conv` asks for, at most 2048 channels, and
    that no gradient is asked for.
    """
    return (
        not torch.is_grad_enabled()
        and x.shape[1] <= _MAX_CHANNELS
        and _fit(x, mean, var, weight, bias)
    )


def supports_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether :func:`layer_norm` can take these tensors.

    That is what :func:`supports_depthwise_conv` asks for, and at most 2048 channels.
    """
    return x.shape[-1] <= _MAX_CHANNELS and _fit(x, weight, bias)


def supports_mlla_block(
    x: Tensor, parameters: Sequence[Optional[Tensor]], num_heads: int
) -> bool:
    """Whether :func:`mlla_block` can take these tensors.

    That is what :func:`supports_mlla_attention` and :func:`supports_layer_norm` ask
    for, and parameters of the shapes that a block has, all but the bias of ``qk``.
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
    """Shapes of weight and bias of each layer of a block, in their order."""
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
    """:func:`mlla_mm.ops.naive.depthwise_conv` in one kernel, contiguous."""
    from ._depthwise_conv import DepthwiseConv

    return DepthwiseConv.apply(x, weight, bias, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """:func:`mlla_mm.ops.naive.mlla_attention` in three passes over the tokens.

    ``qk``, ``v`` and ``gate`` may be slices of wider maps along the channels; the
    output is contiguous.
    """
    from ._mlla_attention import MLLAAttention

    return MLLAAttention.apply(qk, v, gate, weight, bias, num_heads)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`mlla_mm.ops.naive.layer_norm` in one kernel, contiguous."""
    from ._layer_norm import LayerNorm

    return LayerNorm.apply(x, weight, bias, eps)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`mlla_mm.ops.naive.linear_relu` in one product, and its gradient."""
    from ._linear import LinearReLU

    return LinearReLU.apply(x, weight, bias)


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
) -> Tensor:
    """A whole :class:`mlla_mm.models.layers.MLLABlock`.

    Args:
        x (Tensor): (N, H, W, C).
        parameters (Sequence[Tensor | None]): Those of the block, in their order:
            weight and bias of each layer.
        num_heads (int): Number of attention heads.
        eps (tuple[float, float]): Of both LayerNorms.
        scales (tuple[Tensor | None, Tensor | None]): What stochastic depth multiplies
            the branches of each image by, (N,) in float32; None for 1.

    Returns:
        Tensor: (N, H, W, C), the dtype that x keeps when half precision is added to it.
    """
    from . import _block

    x = x.contiguous()
    if torch.is_grad_enabled():
        return _block.MLLABlock.apply(x, num_heads, eps, scales, *parameters)
    weights = _block.Weights(*parameters)
    return _block.forward(x, num_heads, eps, scales, weights, keep=False)[0]
