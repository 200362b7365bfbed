# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""LayerNorm over the channels of a map, computed in float32.

With ``h = (x - mean) / sqrt(var + eps)`` the output is ``h w + b``. PyTorch's kernel is
slower for two reasons. It gives each row a block of threads, most of which are idle if
there are few channels. And under autocast it reads and writes float32. The backward
pass computes h again, and adds the gradient r of the residual connection around the
layers that follow::

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
        return (*layer_norm_grad(x, weight, bias, ctx.eps, grad), None)


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
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad: Tensor,
    residual: Optional[Tensor] = None,
) -> Tuple[Tensor, ...]:
    """Gradients of x, weight and bias.

    Args:
        x (Tensor): (..., C).
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance.
        grad (Tensor): Gradient of the output, (..., C).
        residual (Tensor, optional): A gradient of x, (..., C), which is added.
            Defaults to None.
    """
    rows, grads = as_rows(x), as_rows(grad)
    others = grads if residual is None else as_rows(residual)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = plan_rows(rows.shape[1], _NUMBERS)
    programs = min(_PROGRAMS, ceil_div(len(rows), _TILES * sizes['BLOCK']))
    sums = x.new_empty((programs, 2, x.shape[-1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _layer_norm_grad_kernel[(programs,)](
            rows,
            rows.stride(0),
            weight.contiguous(),
            grads,
            grads.stride(0),
            others,
            others.stride(0),
            grad_x,
            sums,
            len(rows),
            eps,
            **sizes,
            ADD=residual is not None,
        )
    return (grad_x, *add_up(sums, weight, bias))


@triton.jit
def _load_normalised(x_ptr, x_stride, rows, channels, mask, eps, C: tl.constexpr):
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
    h, _ = _load_normalised(x_ptr, x_stride, rows, channels, mask, eps, C)
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
    dy_ptr,
    dy_stride,
    added_ptr,
    added_stride,
    dx_ptr,
    sums_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ADD: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_C)
    weight = load_float(weight_ptr + channels, channels < C)
    weight_sum = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        rows = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (channels < C)[None, :]
        h, inverse = _load_normalised(x_ptr, x_stride, rows, channels, mask, eps, C)
        dy = load_float(dy_ptr + rows[:, None] * dy_stride + channels[None, :], mask)
        weight_sum += dy * h
        bias_sum += dy
        g = dy * weight[None, :]
        mean = tl.sum(g, axis=1) / C
        product = tl.sum(g * h, axis=1) / C
        dx = (g - mean[:, None] - h * product[:, None]) * inverse[:, None]
        if ADD:
            added = added_ptr + rows[:, None] * added_stride + channels[None, :]
            dx += load_float(added, mask)
        tl.store(dx_ptr + rows[:, None] * C + channels[None, :], dx, mask=mask)
    sums_ptr += tl.program_id(0) * (2 * C) + channels
    tl.store(sums_ptr, tl.sum(weight_sum, axis=0), mask=channels < C)
    tl.store(sums_ptr + C, tl.sum(bias_sum, axis=0), mask=channels < C)


@statement_of(_layer_norm_grad_kernel)
def _layer_norm_grad_moves(k: Any) -> Moves:
    size = k.num_rows * k.C
    return Moves(
        reads=dict(x_ptr=size, weight_ptr=k.C, dy_ptr=size, added_ptr=size * k.ADD),
        writes=dict(dx_ptr=size, sums_ptr=k.sums_ptr.numel()),
    )
