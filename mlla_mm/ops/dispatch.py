# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which implementation of an op runs.

:mod:`mlla_mm.ops.eager` does, but for graphs: what is traced, exported, compiled or
counted has the plain definitions of :mod:`mlla_mm.ops.naive`, which compilers fuse
themselves and whose operators other runtimes know.

The environment variable ``MLLA_OPS`` chooses otherwise: ``naive`` takes the plain
definitions always; ``fused`` takes the kernels of :mod:`mlla_mm.ops.triton` for what
they support, and :mod:`mlla_mm.ops.eager` for the rest. Those have not been run on a
GPU yet, so nothing else switches them on.
"""

import os
from types import ModuleType

import torch
from torch import Tensor

from . import eager, naive, triton
from .tracing import is_graph


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""
    if is_graph():
        return naive.depthwise_conv(x, weight, bias, residual, act)
    ops = _implementation(x.device)
    if ops is triton and not triton.supports_depthwise_conv(x, weight, bias):
        ops = eager
    return ops.depthwise_conv(x, weight, bias, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""
    tensors = (qk, v, gate, weight, bias)
    if is_graph():
        return naive.mlla_attention(*tensors, num_heads)
    ops = _implementation(v.device)
    if ops is triton and not triton.supports_mlla_attention(*tensors, num_heads):
        ops = eager
    return ops.mlla_attention(*tensors, num_heads)


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlp`."""
    tensors = (x, weight1, bias1, weight2, bias2)
    if is_graph() or _implementation(x.device) is naive:
        return naive.mlp(*tensors)
    return eager.mlp(*tensors)


def in_parts(x: Tensor, expansion: int) -> int:
    """In how many parts to compute a map ``expansion`` times as large as ``x`` from it.

    In one for gradients, whose pass needs the whole map, in graphs and for
    ``MLLA_OPS=naive``; else see :func:`mlla_mm.ops.eager.num_parts`.
    """
    if torch.is_grad_enabled() or is_graph() or _implementation(x.device) is naive:
        return 1
    return eager.num_parts(x.device, x.numel() * expansion)


def _implementation(device: torch.device) -> ModuleType:
    forced = os.environ.get('MLLA_OPS', '')
    if forced not in ('', 'naive', 'fused'):
        raise ValueError(
            f"MLLA_OPS is '{forced}': set it to 'naive' or 'fused', or unset it."
        )
    if forced == 'naive':
        return naive
    if forced != 'fused':
        return eager
    if not triton.is_available(device):
        raise ValueError(
            f"MLLA_OPS is 'fused', but Triton's kernels do not run on {device}: they "
            'need an NVIDIA GPU of compute capability 8.0 or more, and Triton 3.3 '
            '(PyTorch 2.7). Unset it.'
        )
    return triton
