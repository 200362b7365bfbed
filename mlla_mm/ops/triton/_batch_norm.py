# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""BatchNorm by running statistics, and ReLU, in one pass over a map."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import SIZES, ceil_div, load_float, plan_rows
from ._moves import Moves, statement_of

_NUMBERS = 2048


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: bool,
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.batch_norm`. It has no gradients."""
    # Copies nothing of a channels-last map.
    rows = x.permute(0, 2, 3, 1).contiguous()
    y = torch.empty_like(rows)
    channels = rows.shape[-1]
    num_rows = rows.numel() // channels
    sizes = plan_rows(channels, _NUMBERS)
    with torch.cuda.device_of(x):
        _batch_norm_kernel[(ceil_div(num_rows, sizes['BLOCK']),)](
            rows,
            *(tensor.contiguous() for tensor in (mean, var, weight, bias)),
            y,
            num_rows,
            eps,
            **sizes,
            ACT=act,
        )
    return y.permute(0, 3, 1, 2)


@triton.jit(do_not_specialize=SIZES)
def _batch_norm_kernel(
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (channels < C)[None, :]
    mean = load_float(mean_ptr + channels, channels < C)
    variance = load_float(var_ptr + channels, channels < C)
    scale = tl.rsqrt(variance + eps) * load_float(weight_ptr + channels, channels < C)
    bias = load_float(bias_ptr + channels, channels < C)
    offsets = rows[:, None] * C + channels[None, :]
    y = load_float(x_ptr + offsets, mask) - mean[None, :]
    y = y * scale[None, :] + bias[None, :]
    if ACT:
        # Not the maximum with zero: that would hide a NaN.
        y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + offsets, y, mask=mask)


@statement_of(_batch_norm_kernel)
def _batch_norm_moves(k: Any) -> Moves:
    size = k.num_rows * k.C
    vectors = dict.fromkeys(('mean_ptr', 'var_ptr', 'weight_ptr', 'bias_ptr'), k.C)
    return Moves(reads=dict(x_ptr=size, **vectors), writes=dict(y_ptr=size))
