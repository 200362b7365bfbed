# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Sums over all rows of a map, in two steps: in each program, then over programs.

The order is always the same, since there are no atomics.
"""

from typing import Any, List, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import SIZES, SUMMANDS, TAPS, ceil_div, load_float, plan_rows
from ._moves import Moves, statement_of

_PROGRAMS, _NUMBERS = 512, 2048
# Number of programs and of channels in a tile of the second step.
_PARTS, _COLUMNS = 256, 32


def column_sums(x: Tensor) -> Tensor:
    """Sum the rows of x in each program, as :func:`add_up` takes it.

    For half precision, PyTorch's sum over the first axis takes five times as long as
    reading the numbers.

    Args:
        x (Tensor): (rows, C), neighbouring channels side by side.

    Returns:
        Tensor: (programs, 1, C), float32.
    """
    rows, channels = x.shape
    sizes = plan_rows(channels, _NUMBERS)
    programs = min(_PROGRAMS, ceil_div(rows, sizes['BLOCK']))
    sums = x.new_empty((programs, 1, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _column_sums_kernel[(programs,)](x, x.stride(0), sums, rows, **sizes)
    return sums


def add_up(*maps: Tuple[Tensor, Sequence[Tensor]]) -> List[Tensor]:
    """Add up the sums of all programs, for up to nine maps in one launch.

    Args:
        *maps (tuple[Tensor, Sequence[Tensor]]): For each map the sums of its programs,
            (programs, R, C) in float32, and tensors with the shapes and dtypes of the
            results. These take the R C totals row by row. Of R = 10 rows, the first
            nine are the taps of a stencil, which lie together for each channel.

    Returns:
        list[Tensor]: The results of all maps, in order.
    """
    shapes = [sums.shape for sums, _ in maps]
    grid = sum(rows * ceil_div(width, _COLUMNS) for _, rows, width in shapes)
    device = maps[0][0].device
    sizes = [like.numel() for _, likes in maps for like in likes]
    totals = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    with torch.cuda.device_of(totals):
        _add_up_kernel[(grid,)](
            tuple(sums for sums, _ in maps),
            tuple(shape[1] for shape in shapes),
            tuple(shape[2] for shape in shapes),
            totals,
            *(shape[0] for shape in shapes),
            *[0] * (len(SUMMANDS) - len(shapes)),
            PARTS=_PARTS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    likes = [like for _, likes in maps for like in likes]
    return [_view_as(part, like) for part, like in zip(totals.split(sizes), likes)]


def _view_as(part: Tensor, like: Tensor) -> Tensor:
    part = part.view(like.shape)
    if like.is_contiguous():
        # The strides of axes of length one, too, as in buckets for gradients.
        part = part.as_strided(part.shape, like.stride())
    return part.to(like.dtype)


@triton.jit(do_not_specialize=SIZES)
def _column_sums_kernel(
    x_ptr,
    x_stride,
    sums_ptr,
    num_rows,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        rows = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (channels < C)[None, :]
        sums += load_float(x_ptr + rows[:, None] * x_stride + channels[None, :], mask)
    sums_ptr += tl.program_id(0) * C + channels
    tl.store(sums_ptr, tl.sum(sums, axis=0), mask=channels < C)


@statement_of(_column_sums_kernel)
def _column_sums_moves(k: Any) -> Moves:
    return Moves(
        reads=dict(x_ptr=k.num_rows * k.C), writes=dict(sums_ptr=k.sums_ptr.numel())
    )


@triton.jit(do_not_specialize=SIZES)
def _add_up_kernel(
    sums,
    rows,
    widths,
    totals_ptr,
    parts0,
    parts1,
    parts2,
    parts3,
    parts4,
    parts5,
    parts6,
    parts7,
    parts8,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The kernel is compiled for the numbers in tuples that are arguments.
    parts = (parts0, parts1, parts2, parts3, parts4, parts5, parts6, parts7, parts8)
    block = tl.program_id(0)
    for i in tl.static_range(len(sums)):
        blocks = rows[i] * tl.cdiv(widths[i], COLUMNS)
        if (block >= 0) & (block < blocks):
            row = block % rows[i]
            columns = (block // rows[i]) * COLUMNS + tl.arange(0, COLUMNS)
            mask = columns < widths[i]
            total = tl.zeros((PARTS, COLUMNS), tl.float32)
            for start in range(0, parts[i], PARTS):
                part = start + tl.arange(0, PARTS)
                offsets = (part[:, None] * rows[i] + row) * widths[i] + columns[None, :]
                total += load_float(
                    sums[i] + offsets, (part < parts[i])[:, None] & mask[None, :]
                )
            offset = row * widths[i] + columns
            if rows[i] > TAPS:
                if row < TAPS:
                    offset = columns * TAPS + row
            tl.store(totals_ptr + offset, tl.sum(total, axis=0), mask=mask)
        block -= blocks
        totals_ptr += rows[i] * widths[i]


@statement_of(_add_up_kernel)
def _add_up_moves(k: Any) -> Moves:
    return Moves(
        reads=dict(sums=sum(sums.numel() for sums in k.sums)),
        writes=dict(totals_ptr=k.totals_ptr.numel()),
    )
