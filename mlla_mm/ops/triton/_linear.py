# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Linear layers with one more step before the output is written.

With ``z = x W^T + b``, one kernel computes one of these:

- ``ReLU(z)``;
- ``GELU(z)``, and z itself for the gradient;
- ``r + s z``, where r is the residual connection and s is the factor of stochastic
  depth for the image;
- the backward pass of ``s z`` for ``x = GELU(h)``. From the gradient e of the output
  come ``s (e W) GELU'(h)``, which is the gradient of h, ``s GELU(h)``, which the
  gradient of W needs, and the row sums of the first, which are the gradient of the bias
  before GELU.

The kernel is for half precision. PyTorch does products in float32, and products without
such a step.
"""

import functools
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat.pytorch import MM_TAKES_OUT_DTYPE, linear_dtype
from .. import naive
from ._common import (
    SIZES,
    block_size,
    ceil_div,
    exp,
    linear_operand,
    reciprocal,
)
from ._moves import Moves, statement_of
from ._sums import add_up, column_sums

_GELU, _RESIDUAL, _GELU_GRAD, _RELU = 0, 1, 2, 3
# Number of rows in a tile of the backward pass. Each tile has partial sums.
_GRAD_ROWS = 128
# The largest value of the standard normal density.
_PEAK = tl.constexpr(0.3989422804014327)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """Compute GELU(z), and also return z if ``keep`` says so.

    Args:
        x (Tensor): (rows, K).
        weight (Tensor): (N, K).
        bias (Tensor): (N,).
        keep (bool): Whether to return z.

    Returns:
        tuple[Tensor, Tensor | None]: GELU(z) and z, each (rows, N).
    """
    if not _fits(x):
        z = F.linear(x, weight, bias)
        return F.gelu(z), z if keep else None
    y = x.new_empty(len(x), len(weight))
    kept = torch.empty_like(y) if keep else None
    _run(_GELU, x, weight, y, kept, bias=bias)
    return y, kept


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Optional[Tensor] = None,
) -> Tensor:
    """Compute r + s z.

    Args:
        x (Tensor): (rows, K).
        weight (Tensor): (N, K).
        bias (Tensor): (N,).
        residual (Tensor): r, (images, ..., N), contiguous, with as many rows as x.
        scale (Tensor, optional): s, one number per image, float32. None means 1.
            Defaults to None.

    Returns:
        Tensor: Shape and dtype of ``residual``.
    """
    if not _fits(x):
        z = F.linear(x, weight, bias).view(residual.shape)
        return residual + (z if scale is None else z * scale.view(-1, 1, 1, 1))
    y = torch.empty_like(residual)
    _run(_RESIDUAL, x, weight, y, bias=bias, other=residual, scale=scale)
    return y


def gelu_linear_grad(
    grad: Tensor,
    weight: Tensor,
    hidden: Tensor,
    scale: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The backward pass of a linear layer on GELU(h), see the top of this file.

    Args:
        grad (Tensor): Gradient of the output, (rows, K).
        weight (Tensor): (K, N).
        hidden (Tensor): h, (rows, N).
        scale (Tensor, optional): s, one number per image, float32. None means 1.
            Defaults to None.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The gradient of h, (rows, N), s GELU(h),
        (rows, N), and the sums of the first in each program, (programs, 1, N) in
        float32, for :func:`add_up`.
    """
    if not _fits(grad):
        activated = F.gelu(hidden)
        if scale is not None:
            scale = scale.repeat_interleave(len(grad) // len(scale))[:, None]
            grad, activated = grad * scale, activated * scale
        grad = torch.ops.aten.gelu_backward(grad @ weight, hidden)
        return grad, activated, column_sums(grad)
    grad_hidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    tiles = ceil_div(len(grad), _GRAD_ROWS)
    sums = hidden.new_empty((tiles, 1, hidden.shape[1]), dtype=torch.float32)
    outputs = grad_hidden, activated, sums
    _run(_GELU_GRAD, grad, weight, *outputs, other=hidden, scale=scale)
    return grad_hidden, activated, sums


class LinearReLU(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.linear_relu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, rows, matrix = linear_relu(x, weight, bias)
        ctx.save_for_backward(rows, matrix, weight, bias, y)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        rows, matrix, weight, bias, y = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = torch.ops.aten.threshold_backward(grad.reshape(y.shape), y, 0)
            grads = (
                (grad @ matrix).view(ctx.shape),
                weight_grad(grad, rows, weight),
                *add_up((column_sums(grad), (bias,))),
            )
        needed = zip(grads, ctx.needs_input_grad)
        return tuple(grad if needs else None for grad, needs in needed)


def linear_relu(
    x: Tensor, weight: Tensor, bias: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """ReLU(z), (rows, N), of a map (..., K), with rows of x and W as autocast has them.

    The backward pass needs both factors.
    """
    dtype = linear_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x, matrix = x.to(dtype), weight.to(dtype).contiguous()
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return _linear_relu(rows, matrix, bias.to(dtype)), rows, matrix


def _linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(rows, K) -> (rows, N). cuBLAS has this, too, but its ReLU turns NaN into 0."""
    if not _fits(x):
        return F.linear(x, weight, bias).relu_()
    y = x.new_empty(len(x), len(weight))
    _run(_RELU, x, weight, y, bias=bias.contiguous())
    return y


def weight_grad(grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Gradient of a linear layer's weight, in the dtype of the weight."""
    if grad.dtype == like.dtype or not (grad.is_cuda and MM_TAKES_OUT_DTYPE):
        return (grad.t() @ x).to(like.dtype)
    return torch.mm(grad.t(), x, out_dtype=like.dtype)


def _fits(x: Tensor) -> bool:
    return x.dtype in naive.HALF


def _run(
    mode: int,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    second: Optional[Tensor] = None,
    sums: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    other: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
) -> None:
    rows, columns = len(x), y.shape[-1]
    sizes = _plan(mode, x.shape[1], columns)
    tiles = ceil_div(rows, sizes['BLOCK_M']), ceil_div(columns, sizes['BLOCK_N'])
    grid = (tiles[0] * tiles[1],)
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            x,
            x.stride(0),
            weight,
            bias,
            other,
            scale,
            y,
            second,
            sums,
            rows,
            rows if scale is None else rows // len(scale),
            **sizes,
            OPERAND=linear_operand(x),
            MODE=mode,
        )


@functools.lru_cache
def _plan(mode: int, summands: int, columns: int) -> Dict[str, int]:
    block_k = min(block_size(summands, least=32), 64)
    block_n = min(block_size(columns, least=32), 128)
    block_m, num_warps = _GRAD_ROWS, 8
    if mode == _GELU_GRAD:
        # The last step needs as many registers as half a tile.
        block_n = min(block_n, 64)
    elif mode == _GELU and summands <= 64:
        # GELU takes longer than the product, so more programs have to run at once.
        block_m, block_n, num_warps = 64, min(block_n, 64), 4
    elif mode == _RESIDUAL:
        block_m, num_warps = (64 if block_n == 128 else 128), 4
    return dict(
        N=columns,
        K=summands,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=3,
    )


@triton.jit
def normal(x):
    """Distribution function and density of the standard normal distribution.

    Abramowitz and Stegun 26.2.17, whose error is below 7.5e-8. It has half the
    instructions of erf, which would take longer than reading and writing the map.
    """
    density = _PEAK * exp(-0.5 * x * x)
    t = reciprocal(1.0 + 0.2316419 * tl.abs(x))
    tail = t * (-1.821255978 + t * 1.330274429)
    tail = t * (-0.356563782 + t * (1.781477937 + tail))
    tail = density * t * (0.319381530 + tail)
    return tl.where(x > 0, 1.0 - tail, tail), density


@triton.jit(do_not_specialize=SIZES)
def _linear_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    other_ptr,
    scale_ptr,
    y_ptr,
    second_ptr,
    sums_ptr,
    num_rows,
    rows_per_image,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
    MODE: tl.constexpr,
):
    # Neighbouring programs share the rows, which are then in the cache.
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    # Rows that are not there are read as the last one, without a mask.
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    summands = tl.arange(0, BLOCK_K)
    x_ptr += x_rows[:, None] * x_stride + summands[None, :]
    w_columns = columns % N
    if MODE == 2:  # _GELU_GRAD, whose weight is not transposed
        weight_ptr += summands[:, None] * N + w_columns[None, :]
    else:
        weight_ptr += w_columns[None, :] * K + summands[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptr)
            weight = tl.load(weight_ptr)
        else:
            x = tl.load(x_ptr, mask=(summands < K - k)[None, :], other=0.0)
            weight = tl.load(weight_ptr, mask=(summands < K - k)[:, None], other=0.0)
        z = tl.dot(x.to(OPERAND), weight.to(OPERAND), z)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K * N if MODE == 2 else BLOCK_K

    mask = inside[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        z += bias.to(tl.float32)[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + x_rows // rows_per_image)[:, None]
    if MODE == 0:  # _GELU
        if second_ptr is not None:
            tl.store(second_ptr + offsets, z, mask=mask)
        distribution, _ = normal(z)
        tl.store(y_ptr + offsets, z * distribution, mask=mask)
    elif MODE == 1:  # _RESIDUAL
        if scale_ptr is not None:
            z *= scale
        z += tl.load(other_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, z, mask=mask)
    elif MODE == 3:  # _RELU
        # Not the maximum with zero: that would hide a NaN.
        tl.store(y_ptr + offsets, tl.where(z < 0, 0.0, z), mask=mask)
    else:  # _GELU_GRAD
        hidden = tl.load(other_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        distribution, density = normal(hidden)
        activated = hidden * distribution
        # Numbers of half the size change threads, and nothing is computed twice.
        z = z.to(OPERAND).to(tl.float32)
        z *= distribution + hidden * density
        if scale_ptr is not None:
            activated *= scale
            z *= scale
        tl.store(second_ptr + offsets, activated, mask=mask)
        tl.store(y_ptr + offsets, z, mask=mask)
        z = tl.where(mask, z, 0.0)
        tl.store(sums_ptr + block * N + columns, tl.sum(z, axis=0), mask=columns < N)


@statement_of(_linear_kernel)
def _linear_moves(k: Any) -> Moves:
    size = k.num_rows * k.N
    return Moves(
        reads=dict(
            x_ptr=k.num_rows * k.K,
            weight_ptr=k.N * k.K,
            bias_ptr=k.N,
            other_ptr=size,
            scale_ptr=k.num_rows // k.rows_per_image,
        ),
        writes=dict(
            y_ptr=size,
            second_ptr=size,
            sums_ptr=ceil_div(k.num_rows, k.BLOCK_M) * k.N,
        ),
        flops=2 * size * k.K,
    )
