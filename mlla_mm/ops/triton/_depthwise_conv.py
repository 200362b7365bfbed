# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""3x3 depthwise convolution with bias, SiLU and residual.

With ``z = conv(x) + b`` and ``y = [x +] [SiLU](z)``, forward reads x and writes y.
Backward recomputes z from x to write its gradient (without SiLU that is y's); a second
kernel reads it and x for every other gradient.
"""

from typing import Dict, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ._common import (
    SIZES,
    as_rows,
    conv3x3,
    conv3x3_grad,
    deal_tiles,
    load_float,
    load_taps,
    locate,
    reduce_sums,
    silu,
    silu_grad,
    store_sums,
    tile_range,
    zero_sums,
)

_BLOCK = 32
# Ten sums per token and channel are held in registers.
_BLOCK_OF_SUMS = 16
_MAX_BLOCK_C = 64


class DepthwiseConv(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: bool,
        act: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.residual, ctx.act = residual, act
        y = torch.empty(x.shape, dtype=_result_dtype(x, residual), device=x.device)
        rows = as_rows(x)
        weight, bias = weight.contiguous(), bias.contiguous()
        grid, sizes = _plan(x, _BLOCK, programs=4096, least=1)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](
                rows,
                rows.stride(0),
                weight,
                bias,
                y,
                **sizes,
                ACT=act,
                RESIDUAL=residual,
                num_warps=4,
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tuple:
        x, weight, bias = ctx.saved_tensors
        grad_z = _grad_before_act(x, weight, bias, grad) if ctx.act else grad
        rows, grad_rows, grad_z_rows = as_rows(x), as_rows(grad), as_rows(grad_z)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid, sizes = _plan(x, _BLOCK_OF_SUMS, programs=2048, least=8)
        # One row per program and image, each the ten sums of all channels.
        sums = grad.new_empty((grid[1] * grid[2], 10, x.shape[-1]), dtype=torch.float32)
        with torch.cuda.device_of(x):
            _grad_kernel[grid](
                rows,
                rows.stride(0),
                weight.contiguous(),
                grad_rows,
                grad_rows.stride(0),
                grad_z_rows,
                grad_z_rows.stride(0),
                grad_x,
                sums,
                **sizes,
                RESIDUAL=ctx.residual,
                num_warps=4,
            )
        grads = (grad_x, *reduce_sums(sums, weight, bias))
        needed = zip(grads, ctx.needs_input_grad)
        return (*(grad if needs else None for grad, needs in needed), None, None)


def _result_dtype(x: Tensor, residual: bool) -> torch.dtype:
    """The dtype that autocast gives the plain definition."""
    device = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, dtype) if residual else dtype


def _grad_before_act(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """Gradient before SiLU from the one behind it, (N, H, W, C)."""
    grad_z = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    rows, grad_rows = as_rows(x), as_rows(grad)
    grid, sizes = _plan(x, _BLOCK, programs=4096, least=1)
    with torch.cuda.device_of(x):
        _grad_before_act_kernel[grid](
            rows,
            rows.stride(0),
            weight.contiguous(),
            bias.contiguous(),
            grad_rows,
            grad_rows.stride(0),
            grad_z,
            **sizes,
            num_warps=4,
        )
    return grad_z


def _plan(
    x: Tensor, block: int, programs: int, least: int
) -> Tuple[Tuple[int, int, int], Dict[str, int]]:
    """The grid (blocks of channels, programs per image, images), and kernels' sizes."""
    number, height, width, channels = x.shape
    block_c = min(triton.next_power_of_2(channels), _MAX_BLOCK_C)
    blocks = triton.cdiv(channels, block_c)
    tiling = deal_tiles(height, width, block, blocks * number, programs, least)
    sizes = dict(
        height=height,
        width=width,
        tiles_per_program=tiling.tiles_per_program,
        C=channels,
        BLOCK=block,
        BLOCK_C=block_c,
    )
    return (blocks, tiling.programs, number), sizes


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    taps = load_taps(weight_ptr, channels, channel_mask)
    bias = load_float(bias_ptr + channels, channel_mask)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(
            tl.program_id(2), tile, height, width, BLOCK
        )
        mask = inside[:, None] & channel_mask[None, :]
        x = x_ptr + tokens[:, None] * x_stride + channels[None, :]
        y = conv3x3(x, x_stride, rows, columns, channel_mask, height, width, taps)
        y += bias[None, :]
        if ACT:
            y = silu(y)
        if RESIDUAL:
            y += load_float(x, mask)
        tl.store(y_ptr + tokens[:, None] * C + channels[None, :], y, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _grad_before_act_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dy_stride,
    dz_ptr,
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    taps = load_taps(weight_ptr, channels, channel_mask)
    bias = load_float(bias_ptr + channels, channel_mask)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(
            tl.program_id(2), tile, height, width, BLOCK
        )
        mask = inside[:, None] & channel_mask[None, :]
        x = x_ptr + tokens[:, None] * x_stride + channels[None, :]
        z = conv3x3(x, x_stride, rows, columns, channel_mask, height, width, taps)
        z += bias[None, :]
        dy = load_float(dy_ptr + tokens[:, None] * dy_stride + channels[None, :], mask)
        dz = dy * silu_grad(z)
        tl.store(dz_ptr + tokens[:, None] * C + channels[None, :], dz, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _grad_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    dy_ptr,
    dy_stride,
    dz_ptr,
    dz_stride,
    dx_ptr,
    sums_ptr,
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    taps = load_taps(weight_ptr, channels, channel_mask)
    sums = zero_sums(BLOCK, BLOCK_C)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(
            tl.program_id(2), tile, height, width, BLOCK
        )
        mask = inside[:, None] & channel_mask[None, :]
        x = load_float(x_ptr + tokens[:, None] * x_stride + channels[None, :], mask)
        dz = dz_ptr + tokens[:, None] * dz_stride + channels[None, :]
        dx, sums = conv3x3_grad(
            dz,
            dz_stride,
            rows,
            columns,
            channel_mask,
            height,
            width,
            taps,
            x,
            sums,
        )
        if RESIDUAL:
            dy = dy_ptr + tokens[:, None] * dy_stride + channels[None, :]
            dx += load_float(dy, mask)
        tl.store(dx_ptr + tokens[:, None] * C + channels[None, :], dx, mask=mask)
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    sums_ptr += program.to(tl.int64) * (10 * C) + channels
    store_sums(sums_ptr, channel_mask, sums, C)
