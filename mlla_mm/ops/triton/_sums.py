# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Sums over all rows of a map, in two steps: in each program, then over programs.

The order is always the same, since there are no atomics.
"""

from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import SIZES, ceil_div, load_float, plan_rows
from ._moves import Moves, statement_of

_PROGRAMS, _NUMBERS = 512, 2048
# Number of programs and of channels in a tile of the second step.
_PARTS, _COLUMNS = 256, 32


def column_sums(
    x: Tensor, scale: Optional[Tensor] = None, like: Optional[Tensor] = None
) -> Tensor:
    """Sum the rows of x, each multiplied by the scale of its image.

    For half precision, PyTorch's sum over the first axis takes five times as long as
    reading the numbers.

    Args:
        x (Tensor): (rows, C), neighbouring channels side by side.
        scale (Tensor, optional): One number per image, float32. None means 1.
            Defaults to None.
        like (Tensor, optional): A tensor with the shape and dtype of the result. None
            means (C,) in float32. Defaults to None.

    Returns:
        Tensor: The sum.
    """
    rows, channels = x.shape
    sizes = plan_rows(channels, _NUMBERS)
    programs = min(_PROGRAMS, ceil_div(rows, sizes['BLOCK']))
    sums = x.new_empty((programs, 1, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _column_sums_kernel[(programs,)](
            x,
            x.stride(0),
            scale,
            sums,
            rows,
            rows if scale is None else rows // len(scale),
            **sizes,
        )
    return add_up(sums, sums[0, 0] if like is None else like)[0]


def add_up(sums: Tensor, *likes: Tensor) -> Tuple[Tensor, ...]:
    """Add up the sums of all programs.

    Args:
        sums (Tensor): (programs, R, C) in float32.
        *likes (Tensor): Tensors with the shapes and dtypes of the results. The last one
            is for the last row, (C,). If R > 1, another one before it is for the first
            R - 1 rows. It has C (R - 1) numbers, channel by channel.

    Returns:
        tuple[Tensor]: One result for each of ``likes``.
    """
    parts, rows, channels = sums.shape
    results = tuple(torch.empty_like(x.contiguous()) for x in likes)
    with torch.cuda.device_of(sums):
        _add_up_kernel[(ceil_div(channels, _COLUMNS), rows)](
            sums,
            results[0] if rows > 1 else None,
            results[-1],
            parts,
            C=channels,
            R=rows,
            PARTS=_PARTS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return results


@triton.jit(do_not_specialize=SIZES)
def _column_sums_kernel(
    x_ptr,
    x_stride,
    scale_ptr,
    sums_ptr,
    num_rows,
    rows_per_image,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        rows = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside = rows < num_rows
        mask = inside[:, None] & (channels < C)[None, :]
        x = load_float(x_ptr + rows[:, None] * x_stride + channels[None, :], mask)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + rows // rows_per_image, mask=inside, other=0.0)
            x *= scale[:, None]
        sums += x
    sums_ptr += tl.program_id(0) * C + channels
    tl.store(sums_ptr, tl.sum(sums, axis=0), mask=channels < C)


@statement_of(_column_sums_kernel)
def _column_sums_moves(k: Any) -> Moves:
    images = k.num_rows // k.rows_per_image
    return Moves(
        reads=dict(x_ptr=k.num_rows * k.C, scale_ptr=images),
        writes=dict(sums_ptr=k.sums_ptr.numel()),
    )


@triton.jit(do_not_specialize=SIZES)
def _add_up_kernel(
    sums_ptr,
    first_ptr,
    last_ptr,
    parts,
    C: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1)
    channels = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (channels < C)[None, :]
        total += load_float(
            sums_ptr + (part[:, None] * R + row) * C + channels[None, :], mask
        )
    total = tl.sum(total, axis=0)
    if R > 1:
        if row < R - 1:
            tl.store(first_ptr + channels * (R - 1) + row, total, mask=channels < C)
    if row == R - 1:
        tl.store(last_ptr + channels, total, mask=channels < C)


@statement_of(_add_up_kernel)
def _add_up_moves(k: Any) -> Moves:
    return Moves(
        reads=dict(sums_ptr=k.parts * k.R * k.C),
        writes=dict(first_ptr=(k.R - 1) * k.C, last_ptr=k.C),
    )
