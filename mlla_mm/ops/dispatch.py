# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which implementation of an op runs.

- :mod:`mlla_mm.ops.naive`, the plain definitions, for graphs: what is traced, exported,
  compiled or counted. Compilers fuse them themselves, and other runtimes know their
  operators.
- :mod:`mlla_mm.ops.triton` on NVIDIA GPUs, for what its kernels support.
- :mod:`mlla_mm.ops.eager` for the rest.

The environment variable ``MLLA_OPS`` chooses otherwise: ``naive`` takes the plain
definitions always, ``eager`` no kernels of Triton's, and ``fused`` those kernels or an
error where they cannot run.
"""

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Optional

from torch import Tensor

from . import eager, naive, triton
from .tracing import is_graph


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""
    ops = _implementation(x)
    if ops is triton and not triton.supports_depthwise_conv(x, weight, bias):
        ops = eager
    return ops.depthwise_conv(x, weight, bias, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""
    tensors = (qk, v, gate, weight, bias)
    ops = _implementation(v)
    if ops is triton and not triton.supports_mlla_attention(*tensors, num_heads):
        ops = eager
    return ops.mlla_attention(*tensors, num_heads)


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlp`."""
    ops = naive if _implementation(x) is naive else eager
    return ops.mlp(x, weight1, bias1, weight2, bias2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`mlla_mm.ops.naive.layer_norm`."""
    fused = is_fused(x) and triton.supports_layer_norm(x, weight, bias)
    return (triton if fused else naive).layer_norm(x, weight, bias, eps)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mlla_mm.ops.naive.linear_relu`."""
    fused = is_fused(x) and triton.supports_linear_relu(x, weight, bias)
    return (triton if fused else naive).linear_relu(x, weight, bias)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: bool,
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.batch_norm`."""
    tensors = (x, mean, var, weight, bias)
    fused = is_fused(x) and triton.supports_batch_norm(*tensors)
    return (triton if fused else naive).batch_norm(*tensors, eps, act)


def fused_block(
    x: Tensor, parameters: Sequence[Optional[Tensor]], num_heads: int
) -> Optional[Callable[..., Tensor]]:
    """:func:`mlla_mm.ops.triton.mlla_block`, if it is what runs; else None."""
    if is_fused(x) and triton.supports_mlla_block(x, parameters, num_heads):
        return triton.mlla_block
    return None


def is_fused(x: Tensor) -> bool:
    """Whether the kernels of :mod:`mlla_mm.ops.triton` run for what they support."""
    return _implementation(x) is triton


def _implementation(x: Tensor) -> ModuleType:
    if is_graph():
        return naive
    forced = os.environ.get('MLLA_OPS', '')
    if forced not in ('', 'naive', 'eager', 'fused'):
        raise ValueError(
            f"MLLA_OPS is '{forced}': set it to 'naive', 'eager' or 'fused', or unset "
            'it.'
        )
    if forced == 'naive':
        return naive
    if forced == 'eager' or not (forced or x.is_cuda):
        return eager
    if triton.is_available(x.device):
        return triton
    if forced:
        raise ValueError(
            f"MLLA_OPS is 'fused', but Triton's kernels do not run on {x.device}: they "
            'need an NVIDIA GPU of compute capability 8.0 or more, and Triton 3.3 '
            '(PyTorch 2.7). Unset it.'
        )
    return eager
