# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""LayerNorm over the channels of a map, computed in float32.

With ``h = (x - mean) / sqrt(var + eps)`` the output is ``h w + b``. PyTorch's kernel is
slower for two reasons. It gives each row a block of threads, most of which are idle if
there are few channels. And under autocast it reads and writes float32. The backward
pass computes h again. In a block it adds the gradient r of the residual connection
around the layers that follow, and writes the output once more for their gradients::

    dx = (g - mean(g) - h mean(g h)) / sqrt(var + eps) + r,    g = w e
"""

from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat.pytorch import is_autocast
from ._common import SIZES, as_rows, ceil_div, load_float, plan_rows
from ._moves import Moves, statement_of
from ._sums import add_up

# How many numbers a tile has: 8 for each thread.
_NUMBERS = 1024
# Largest number of programs of the backward pass, each of which has partial sums, and
# the fewest tiles for a program.
_PROGRAMS, _TILES = 1056, 8


class LayerNorm(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.layer_norm`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        # Autocast computes LayerNorm in float32. Kernels of whole blocks do not.
        autocast = is_autocast(x.device.type)
        return layer_norm(x, weight, bias, eps, torch.float32 if autocast else x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, bias = ctx.saved_tensors
        grad_x, sums = layer_norm_grad(x, weight, ctx.eps, grad)
        return (grad_x, *add_up((sums, (weight, bias))), None)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """(..., C) -> (..., C), contiguous, in the given dtype."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = as_rows(x)
    sizes = plan_rows(rows.shape[1], _NUMBERS)
    with torch.cuda.device_of(x):
        _layer_norm_kernel[(ceil_div(len(rows), sizes['BLOCK']),)](
            rows,
            rows.stride(0),
            weight.contiguous(),
            bias.contiguous(),
            y,
            len(rows),
            eps,
            **sizes,
        )
    return y


def layer_norm_grad(
    x: Tensor, weight: Tensor, eps: float, grad: Tensor
) -> Tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias in parts.

    Args:
        x (Tensor): (..., C).
        weight (Tensor): (C,).
        eps (float): Added to the variance.
        grad (Tensor): Gradient of the output, (..., C).

    Returns:
        tuple[Tensor, Tensor]: The gradient of x, and for :func:`add_up` the sums of
        each program, (programs, 2, C) in float32: for the weight and for the bias.
    """
    return _run_grad(x, weight, eps, grad, rows=2)


def layer_norm_residual_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad: Tensor,
    residual: Tensor,
    scale: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The backward pass of a branch, at its LayerNorm.

    Behind the branch there is a linear layer and stochastic depth, ``x + s (z + b)``.
    The gradient of b is the sum of s r, where r is the gradient of the branch's output,
    which is at hand here.

    Args:
        x (Tensor): (N, ..., C).
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance.
        grad (Tensor): Gradient of the output of LayerNorm, (N, ..., C).
        residual (Tensor): r, which is added to the gradient of x, (N, ..., C).
        scale (Tensor, optional): s, one number per image, (N,) in float32. None means
            1. Defaults to None.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The gradient of x; for :func:`add_up` the sums of
        each program, (programs, 3, C) in float32: for the weight, the bias and b; and
        the output of LayerNorm once more, (N, ..., C) in the dtype of ``grad``.
    """
    output = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
    grad_x, sums = _run_grad(
        x, weight, eps, grad, 3, bias.contiguous(), as_rows(residual), scale, output
    )
    return grad_x, sums, output


def _run_grad(
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad: Tensor,
    rows: int,
    bias: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    output: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Launch the kernel. ``rows`` is the number of sums for each channel."""
    xs, grads = as_rows(x), as_rows(grad)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = plan_rows(x.shape[-1], _NUMBERS)
    programs = min(_PROGRAMS, ceil_div(len(xs), _TILES * sizes['BLOCK']))
    sums = x.new_empty((programs, rows, x.shape[-1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _layer_norm_grad_kernel[(programs,)](
            xs,
            xs.stride(0),
            weight.contiguous(),
            bias,
            grads,
            grads.stride(0),
            residual,
            0 if residual is None else residual.stride(0),
            scale,
            grad_x,
            output,
            sums,
            len(xs),
            len(xs) if scale is None else len(xs) // len(scale),
            eps,
            **sizes,
        )
    return grad_x, sums


@triton.jit
def load_normalised(x_ptr, x_stride, rows, channels, mask, eps, C: tl.constexpr):
    """h, zero where masked, and 1 / sqrt(var + eps)."""
    x = load_float(x_ptr + rows[:, None] * x_stride + channels[None, :], mask)
    mean = tl.sum(x, axis=1) / C
    x = tl.where(mask, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    return x * inverse[:, None], inverse


@triton.jit(do_not_specialize=SIZES)
def _layer_norm_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (channels < C)[None, :]
    h, _ = load_normalised(x_ptr, x_stride, rows, channels, mask, eps, C)
    weight = load_float(weight_ptr + channels, channels < C)
    bias = load_float(bias_ptr + channels, channels < C)
    y = h * weight[None, :] + bias[None, :]
    tl.store(y_ptr + rows[:, None] * C + channels[None, :], y, mask=mask)


@statement_of(_layer_norm_kernel)
def _layer_norm_moves(k: Any) -> Moves:
    size = k.num_rows * k.C
    return Moves(
        reads=dict(x_ptr=size, weight_ptr=k.C, bias_ptr=k.C), writes=dict(y_ptr=size)
    )


@triton.jit(do_not_specialize=SIZES)
def _layer_norm_grad_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dy_stride,
    residual_ptr,
    residual_stride,
    scale_ptr,
    dx_ptr,
    y_ptr,
    sums_ptr,
    num_rows,
    rows_per_image,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_C)
    weight = load_float(weight_ptr + channels, channels < C)
    weight_sum = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    if residual_ptr is not None:
        bias = load_float(bias_ptr + channels, channels < C)
        residual_sum = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        rows = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside = rows < num_rows
        mask = inside[:, None] & (channels < C)[None, :]
        offsets = rows[:, None] * C + channels[None, :]
        h, inverse = load_normalised(x_ptr, x_stride, rows, channels, mask, eps, C)
        dy = load_float(dy_ptr + rows[:, None] * dy_stride + channels[None, :], mask)
        weight_sum += dy * h
        bias_sum += dy
        g = dy * weight[None, :]
        mean = tl.sum(g, axis=1) / C
        product = tl.sum(g * h, axis=1) / C
        dx = (g - mean[:, None] - h * product[:, None]) * inverse[:, None]
        if residual_ptr is not None:
            y = h * weight[None, :] + bias[None, :]
            tl.store(y_ptr + offsets, y, mask=mask)
            residual = load_float(
                residual_ptr + rows[:, None] * residual_stride + channels[None, :], mask
            )
            dx += residual
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + rows // rows_per_image, inside, other=0.0)
                residual *= scale[:, None]
            residual_sum += residual
        tl.store(dx_ptr + offsets, dx, mask=mask)
    if residual_ptr is not None:
        sums_ptr += tl.program_id(0) * (3 * C) + channels
        tl.store(sums_ptr + 2 * C, tl.sum(residual_sum, axis=0), mask=channels < C)
    else:
        sums_ptr += tl.program_id(0) * (2 * C) + channels
    tl.store(sums_ptr, tl.sum(weight_sum, axis=0), mask=channels < C)
    tl.store(sums_ptr + C, tl.sum(bias_sum, axis=0), mask=channels < C)


@statement_of(_layer_norm_grad_kernel)
def _layer_norm_grad_moves(k: Any) -> Moves:
    size = k.num_rows * k.C
    return Moves(
        reads=dict(
            x_ptr=size,
            weight_ptr=k.C,
            bias_ptr=k.C,
            dy_ptr=size,
            residual_ptr=size,
            scale_ptr=k.num_rows // k.rows_per_image,
        ),
        writes=dict(dx_ptr=size, y_ptr=size, sums_ptr=k.sums_ptr.numel()),
    )
