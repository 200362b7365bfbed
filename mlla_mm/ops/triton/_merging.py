# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The wide part of patch merging, whose maps are the largest of the network.

A linear layer widens a map, and a 3x3 depthwise convolution with stride 2 halves it,
both with ReLU::

    h = ReLU(x W^T + b)         y = ReLU(conv(h) + c)

Output (i, j) sees the inputs from 2i - 1 to 2i + 1 and from 2j - 1 to 2j + 1. With the
gradient e of y, and ``g = e`` where y > 0, else 0, the backward pass goes once over the
maps. The four inputs h(2i + a, 2j + b), with a and b of 0 and 1, are seen by at most
four outputs, of which the taps t are::

    a, b    g(i, j)    g(i, j + 1)    g(i + 1, j)    g(i + 1, j + 1)
    0, 0    t11
    0, 1    t12        t10
    1, 0    t21                       t01
    1, 1    t22        t20            t02            t00

So the gradient of h is a sum of ``g t``, and that of a tap the sum of all its ``g h``.
Where h is 0, the gradient of ``x W^T + b`` is 0.
"""

from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    SIZES,
    as_rows,
    load_float,
    load_taps,
    locate_strip,
    plan_strips,
)
from ._linear import linear_relu, weight_grad
from ._moves import Moves, statement_of
from ._sums import add_up

# Channels of a program, and numbers of a row for each thread, of which the backward
# pass holds eleven sums.
_STRIP = dict(channels=64, numbers=4)


class ExpandAndHalve(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.expand_and_halve`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        taps: Tensor,
        conv_bias: Tensor,
    ) -> Tensor:
        y, kept = forward(x, weight, bias, taps, conv_bias)
        ctx.save_for_backward(*kept, weight, bias, taps, conv_bias, y)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        rows, matrix, h, weight, bias, taps, conv_bias, y = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_z, sums = halve_grad(h, taps, y, grad)
            grad_z = grad_z.view(len(rows), -1)
            totals = add_up((sums[0], (taps, conv_bias)), (sums[1], (bias,)))
            grads = (
                (grad_z @ matrix).view(ctx.shape),
                weight_grad(grad_z, rows, weight),
                totals[2],
                *totals[:2],
            )
        needed = zip(grads, ctx.needs_input_grad)
        return tuple(grad if needs else None for grad, needs in needed)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor
) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor]]:
    """y, and what the backward pass needs: rows of x, and W, as factors, and h."""
    h, rows, matrix = linear_relu(x, weight, bias)
    h = h.view(*x.shape[:-1], -1)
    return halve(h, taps, conv_bias), (rows, matrix, h)


def halve(h: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """``ReLU(conv(h) + c)``.

    Args:
        h (Tensor): (N, 2H, 2W, C), contiguous.
        taps (Tensor): (C, 1, 3, 3).
        bias (Tensor): c, (C,).

    Returns:
        Tensor: (N, H, W, C), in the dtype of ``h``.
    """
    number, height, width, channels = h.shape
    y = h.new_empty(number, height // 2, width // 2, channels)
    grid, sizes = plan_strips(tuple(y.shape), **_STRIP)
    with torch.cuda.device_of(h):
        _halve_kernel[grid](h, taps.contiguous(), bias.contiguous(), y, **sizes)
    return y


def halve_grad(
    h: Tensor, taps: Tensor, y: Tensor, grad: Tensor
) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
    """The backward pass of :func:`halve` and of the ReLU before it.

    Args:
        h (Tensor): (N, 2H, 2W, C), contiguous.
        taps (Tensor): (C, 1, 3, 3).
        y (Tensor): Output of :func:`halve`, (N, H, W, C).
        grad (Tensor): Gradient of ``y``, (N, H, W, C).

    Returns:
        tuple: The gradient before the ReLU, like ``h``, and for :func:`add_up` two maps
        of sums of each program, in float32: (programs, 10, C) for taps and bias, and
        (programs, 1, C) for the bias before the ReLU.
    """
    grads = as_rows(grad)
    grad_z = torch.empty_like(h)
    grid, sizes = plan_strips(tuple(y.shape), **_STRIP)
    programs = grid[1] * grid[2]
    sums, bias_sums = (
        h.new_empty((programs, rows, h.shape[-1]), dtype=torch.float32)
        for rows in (10, 1)
    )
    with torch.cuda.device_of(h):
        _halve_grad_kernel[grid](
            h,
            taps.contiguous(),
            y,
            grads,
            grads.stride(0),
            grad_z,
            sums,
            bias_sums,
            **sizes,
        )
    return grad_z, (sums, bias_sums)


@triton.jit(do_not_specialize=SIZES)
def _halve_kernel(
    h_ptr,
    taps_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    rows,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channels < C
    taps = load_taps(taps_ptr, channels, exists)
    bias = load_float(bias_ptr + channels, exists)[None, :]
    first, last, columns = locate_strip(height, width, rows, TOKENS)
    mask = (columns < width)[:, None] & exists[None, :]
    left = mask & (columns > 0)[:, None]
    image = tl.program_id(2).to(tl.int64) * height
    # The middle input of the first row, which lies at 2i, 2j in a map of 2W columns.
    middle = (image + first) * 4 * width + 2 * columns
    h = h_ptr + middle[:, None] * C + channels[None, :]
    y = y_ptr + ((image + first) * width + columns)[:, None] * C + channels[None, :]
    above = h - 2 * width * C
    # The row below one output is the row above the next.
    a = load_float(above - C, left & (first > 0))
    b = load_float(above, mask & (first > 0))
    c = load_float(above + C, mask & (first > 0))
    for _ in range(first, last):
        below = h + 2 * width * C
        z = bias + a * taps[0] + b * taps[1] + c * taps[2]
        z += load_float(h - C, left) * taps[3]
        z += load_float(h, mask) * taps[4]
        z += load_float(h + C, mask) * taps[5]
        a = load_float(below - C, left)
        b = load_float(below, mask)
        c = load_float(below + C, mask)
        z += a * taps[6] + b * taps[7] + c * taps[8]
        # Not the maximum with zero: that would hide a NaN.
        tl.store(y, tl.where(z < 0, 0.0, z), mask=mask)
        h += 4 * width * C
        y += width * C


@statement_of(_halve_kernel)
def _halve_moves(k: Any) -> Moves:
    return Moves(
        reads=dict(h_ptr=4 * k.y_ptr.numel(), taps_ptr=9 * k.C, bias_ptr=k.C),
        writes=dict(y_ptr=k.y_ptr.numel()),
    )


@triton.jit
def _load_grad(y, grad, mask):
    """The gradient before the ReLU whose output is y."""
    # Not where y > 0: that would hide a NaN.
    return tl.where(load_float(y, mask) <= 0, 0.0, load_float(grad, mask))


@triton.jit(do_not_specialize=SIZES)
def _halve_grad_kernel(
    h_ptr,
    taps_ptr,
    y_ptr,
    dy_ptr,
    dy_stride,
    dz_ptr,
    sums_ptr,
    bias_sums_ptr,
    height,
    width,
    rows,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channels < C
    taps = load_taps(taps_ptr, channels, exists)
    first, last, columns = locate_strip(height, width, rows, TOKENS)
    mask = (columns < width)[:, None] & exists[None, :]
    right = mask & (columns < width - 1)[:, None]
    image = tl.program_id(2).to(tl.int64) * height
    tokens = ((image + first) * width + columns)[:, None]
    y = y_ptr + tokens * C + channels[None, :]
    dy = dy_ptr + tokens * dy_stride + channels[None, :]
    middle = (image + first) * 4 * width + 2 * columns
    offsets = middle[:, None] * C + channels[None, :]
    # Of a 2x2 block of outputs: this one, the right one, and those below.
    g00 = _load_grad(y, dy, mask)
    g01 = _load_grad(y + C, dy + dy_stride, right)
    zero = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    bias_sum = zero
    for row in range(first, last):
        y += width * C
        dy += width * dy_stride
        below = row + 1 < height
        g10 = _load_grad(y, dy, mask & below)
        g11 = _load_grad(y + C, dy + dy_stride, right & below)
        under = offsets + 2 * width * C
        h00 = load_float(h_ptr + offsets, mask)
        h01 = load_float(h_ptr + offsets + C, mask)
        h10 = load_float(h_ptr + under, mask)
        h11 = load_float(h_ptr + under + C, mask)

        d00 = tl.where(h00 <= 0, 0.0, g00 * taps[4])
        d01 = tl.where(h01 <= 0, 0.0, g00 * taps[5] + g01 * taps[3])
        d10 = tl.where(h10 <= 0, 0.0, g00 * taps[7] + g10 * taps[1])
        d11 = g00 * taps[8] + g01 * taps[6] + g10 * taps[2] + g11 * taps[0]
        d11 = tl.where(h11 <= 0, 0.0, d11)
        tl.store(dz_ptr + offsets, d00, mask=mask)
        tl.store(dz_ptr + offsets + C, d01, mask=mask)
        tl.store(dz_ptr + under, d10, mask=mask)
        tl.store(dz_ptr + under + C, d11, mask=mask)
        bias_sum += d00 + d01 + d10 + d11
        sums = (
            sums[0] + g11 * h11,
            sums[1] + g10 * h10,
            sums[2] + g10 * h11,
            sums[3] + g01 * h01,
            sums[4] + g00 * h00,
            sums[5] + g00 * h01,
            sums[6] + g01 * h11,
            sums[7] + g00 * h10,
            sums[8] + g00 * h11,
            sums[9] + g00,
        )
        g00, g01 = g10, g11
        offsets += 4 * width * C
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    sums_ptr += program.to(tl.int64) * (10 * C) + channels
    for i in tl.static_range(10):
        tl.store(sums_ptr + i * C, tl.sum(sums[i], axis=0), mask=exists)
    bias_sums_ptr += program.to(tl.int64) * C + channels
    tl.store(bias_sums_ptr, tl.sum(bias_sum, axis=0), mask=exists)


@statement_of(_halve_grad_kernel)
def _halve_grad_moves(k: Any) -> Moves:
    size = k.y_ptr.numel()
    return Moves(
        reads=dict(h_ptr=4 * size, taps_ptr=9 * k.C, y_ptr=size, dy_ptr=size),
        writes=dict(
            dz_ptr=4 * size,
            sums_ptr=k.sums_ptr.numel(),
            bias_sums_ptr=k.bias_sums_ptr.numel(),
        ),
    )
