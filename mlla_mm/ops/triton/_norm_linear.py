# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""LayerNorm with the linear layers behind it, for maps of few channels.

With ``u = LN(x)``, one kernel computes ``u W^T + b``, and another one a whole MLP with
its residual connection and the factor s of stochastic depth::

    y = x + s (GELU(u W1^T + b1) W2^T + b2)

A program holds whole rows of x, normalises them, and goes along the columns of the
product. So u is never in memory, and neither is the hidden map, which has four times
the size of x. Only the backward pass needs the hidden map before GELU. The second
product is added up in the registers, (rows, C) in float32, which limits C.

The kernels are for half precision. Their products have the factors that PyTorch's have:
u, and what follows GELU, are rounded.
"""

from typing import Any, Dict, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import naive
from ._common import SIZES, ceil_div, linear_operand, load_float, power_of_two
from ._layer_norm import load_normalised
from ._linear import normal
from ._moves import Moves, statement_of

#: Most channels of a map. The sums of 64 rows take 64 registers of each thread.
MAX_CHANNELS = 128


def fits(channels: int, dtype: torch.dtype) -> bool:
    """Whether these kernels take a map and the dtype of its products."""
    return channels <= MAX_CHANNELS and dtype in naive.HALF


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Compute ``LN(x) W^T + b``.

    Args:
        x (Tensor): (..., C), contiguous.
        norm_weight (Tensor): Of LayerNorm, (C,).
        norm_bias (Tensor): Of LayerNorm, (C,).
        eps (float): Added to the variance.
        weight (Tensor): W, (K, C), half precision.
        bias (Tensor): b, (K,), half precision.

    Returns:
        Tensor: (..., K), in the dtype of ``weight``.
    """
    columns, channels = weight.shape
    y = torch.empty((*x.shape[:-1], columns), dtype=weight.dtype, device=x.device)
    rows = x.numel() // channels
    grid, sizes = _plan(rows, channels)
    with torch.cuda.device_of(x):
        _norm_linear_kernel[grid](
            x,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            weight,
            bias,
            y,
            rows,
            eps,
            **sizes,
            COLUMNS=columns,
            OPERAND=linear_operand(weight),
        )
    return y


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Optional[Tensor],
    keep: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """An MLP with LayerNorm before it and the residual connection around both.

    Args:
        x (Tensor): (N, ..., C), contiguous.
        norm_weight (Tensor): Of LayerNorm, (C,).
        norm_bias (Tensor): Of LayerNorm, (C,).
        eps (float): Added to the variance.
        weight1 (Tensor): W1, (K, C), half precision.
        bias1 (Tensor): b1, (K,), half precision.
        weight2 (Tensor): W2, (C, K), half precision.
        bias2 (Tensor): b2, (C,), half precision.
        scale (Tensor, optional): s, one number per image, (N,) in float32. None means
            1.
        keep (bool): Whether to return the hidden map.

    Returns:
        tuple[Tensor, Tensor | None]: y, with the shape and dtype of x, and if ``keep``
        says so ``u W1^T + b1``, (rows, K) in the dtype of the weights.
    """
    columns, channels = weight1.shape
    rows = x.numel() // channels
    y, hidden = torch.empty_like(x), None
    if keep:
        hidden = torch.empty((rows, columns), dtype=weight1.dtype, device=x.device)
    grid, sizes = _plan(rows, channels)
    with torch.cuda.device_of(x):
        _mlp_kernel[grid](
            x,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            weight1,
            bias1,
            weight2,
            bias2,
            scale,
            y,
            hidden,
            rows,
            rows if scale is None else rows // len(scale),
            eps,
            **sizes,
            COLUMNS=columns,
            OPERAND=linear_operand(weight1),
        )
    return y, hidden


def _plan(rows: int, channels: int) -> Tuple[Tuple[int], Dict[str, int]]:
    """The grid, and arguments of both kernels.

    With more rows a program reads the weights for more of them; with more than 64
    channels, the tiles of two steps would not fit into the shared memory of RTX cards.
    """
    block_c = max(16, power_of_two(channels))
    block_m, num_warps = (128, 8) if block_c <= 64 else (64, 4)
    return (ceil_div(rows, block_m),), dict(
        C=channels,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_N=64,
        num_warps=num_warps,
        num_stages=2,
    )


@triton.jit
def _load_norm(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rows,
    channels,
    num_rows,
    eps,
    C: tl.constexpr,
):
    """LN of rows of x, (BLOCK_M, BLOCK_C), zero behind the last channel."""
    inside = channels < C
    mask = (rows < num_rows)[:, None] & inside[None, :]
    h, _ = load_normalised(x_ptr, C, rows, channels, mask, eps, C)
    weight = load_float(norm_weight_ptr + channels, inside)
    bias = load_float(norm_bias_ptr + channels, inside)
    return h * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=SIZES)
def _norm_linear_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    u = _load_norm(
        x_ptr, norm_weight_ptr, norm_bias_ptr, rows, channels, num_rows, eps, C
    )
    u = u.to(y_ptr.dtype.element_ty).to(OPERAND)
    inside = (channels < C)[:, None]
    for start in range(0, COLUMNS, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        exists = columns < COLUMNS
        weight = tl.load(
            weight_ptr + columns[None, :] * C + channels[:, None],
            mask=inside & exists[None, :],
            other=0.0,
        )
        z = tl.dot(u, weight.to(OPERAND)) + load_float(bias_ptr + columns, exists)
        mask = (rows < num_rows)[:, None] & exists[None, :]
        tl.store(y_ptr + rows[:, None] * COLUMNS + columns[None, :], z, mask=mask)


@statement_of(_norm_linear_kernel)
def _norm_linear_moves(k: Any) -> Moves:
    size = k.num_rows * k.COLUMNS
    return Moves(
        reads=dict(
            x_ptr=k.num_rows * k.C,
            norm_weight_ptr=k.C,
            norm_bias_ptr=k.C,
            weight_ptr=k.COLUMNS * k.C,
            bias_ptr=k.COLUMNS,
        ),
        writes=dict(y_ptr=size),
        flops=2 * size * k.C,
    )


@triton.jit(do_not_specialize=SIZES)
def _mlp_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    scale_ptr,
    y_ptr,
    hidden_ptr,
    num_rows,
    rows_per_image,
    eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    u = _load_norm(
        x_ptr, norm_weight_ptr, norm_bias_ptr, rows, channels, num_rows, eps, C
    )
    u = u.to(weight1_ptr.dtype.element_ty).to(OPERAND)
    y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, COLUMNS, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        exists = columns < COLUMNS
        weight = tl.load(
            weight1_ptr + columns[None, :] * C + channels[:, None],
            mask=inside[:, None] & exists[None, :],
            other=0.0,
        )
        z = tl.dot(u, weight.to(OPERAND)) + load_float(bias1_ptr + columns, exists)
        if hidden_ptr is not None:
            mask = (rows < num_rows)[:, None] & exists[None, :]
            tl.store(
                hidden_ptr + rows[:, None] * COLUMNS + columns[None, :], z, mask=mask
            )
        distribution, _ = normal(z)
        activated = (z * distribution).to(weight1_ptr.dtype.element_ty)
        weight = tl.load(
            weight2_ptr + channels[None, :] * COLUMNS + columns[:, None],
            mask=inside[None, :] & exists[:, None],
            other=0.0,
        )
        y = tl.dot(activated.to(OPERAND), weight.to(OPERAND), y)
    y += load_float(bias2_ptr + channels, inside)[None, :]
    if scale_ptr is not None:
        image = tl.minimum(rows, num_rows - 1) // rows_per_image
        y *= tl.load(scale_ptr + image)[:, None]
    offsets = rows[:, None] * C + channels[None, :]
    mask = (rows < num_rows)[:, None] & inside[None, :]
    # Read a second time, from the cache: the registers are full in the loop.
    y += load_float(x_ptr + offsets, mask)
    tl.store(y_ptr + offsets, y, mask=mask)


@statement_of(_mlp_kernel)
def _mlp_moves(k: Any) -> Moves:
    size, hidden = k.num_rows * k.C, k.num_rows * k.COLUMNS
    return Moves(
        reads=dict(
            x_ptr=size,
            norm_weight_ptr=k.C,
            norm_bias_ptr=k.C,
            weight1_ptr=k.COLUMNS * k.C,
            bias1_ptr=k.COLUMNS,
            weight2_ptr=k.COLUMNS * k.C,
            bias2_ptr=k.C,
            scale_ptr=k.num_rows // k.rows_per_image,
        ),
        writes=dict(y_ptr=size, hidden_ptr=hidden),
        flops=2 * 2 * hidden * k.C,
    )
