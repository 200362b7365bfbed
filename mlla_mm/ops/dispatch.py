# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which implementation of an op runs.

The environment variable ``MLLA_OPS`` may name one: ``naive`` takes
:mod:`mlla_mm.ops.naive` for everything. Without it :mod:`mlla_mm.ops.eager` runs, but
for graphs: what is traced, exported, compiled or counted has the plain definitions,
which compilers fuse themselves and whose operators other runtimes know.
"""

import os
from types import ModuleType

from torch import Tensor

from . import eager, naive
from .tracing import is_graph


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""
    return _implementation().depthwise_conv(x, weight, bias, residual, act)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""
    return _implementation().mlla_attention(qk, v, gate, weight, bias, num_heads)


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlp`."""
    return _implementation().mlp(x, weight1, bias1, weight2, bias2)


def _implementation() -> ModuleType:
    forced = os.environ.get('MLLA_OPS', '')
    if forced not in ('', 'naive'):
        raise ValueError(f"MLLA_OPS is '{forced}': set it to 'naive', or unset it.")
    return naive if forced or is_graph() else eager
