# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the kernels share: strips of a feature map, and functions of numbers."""

# Triton's kernels let a tuple grow, which mypy takes for an error.
# mypy: disable-error-code="assignment"

import functools
import math
from typing import Dict, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Arguments of :func:`mlla_mm.ops.triton._sums.add_up`'s kernel: of each map the number
#: of programs.
SUMMANDS = [f'parts{i}' for i in range(9)]

#: Arguments that change from image to image. No kernel is compiled for their values.
SIZES = [
    *SUMMANDS,
    'height',
    'width',
    'rows',
    'num_rows',
    'num_tokens',
    'tiles',
    'parts',
    'rows_per_image',
]

# Number of shapes whose plans are cached. Every launch of a kernel needs a plan.
_PLANS = 4096
#: Number of weights of a 3x3 stencil.
TAPS = tl.constexpr(9)
_LOG2_E = tl.constexpr(math.log2(math.e))

# Number of tokens in a row of a strip.
_TOKENS = 8
# Number of programs that keep a GPU busy, and the fewest rows for a program. It reads
# two more rows than it has.
_PROGRAMS, _LEAST_ROWS = 2048, 8


# Triton has both functions for kernels. On the host those take ten times as long.
def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


@functools.lru_cache(maxsize=_PLANS)
def plan_strips(
    shape: Tuple[int, int, int, int], channels: int, numbers: int
) -> Tuple[Tuple[int, int, int], Dict[str, int]]:
    """Cut a map (N, H, W, C) for a 3x3 stencil.

    A program takes some channels of a strip of 8 columns and goes down its rows, so
    that it reads each row once. The cut depends on the sizes alone, so that sums have
    the same order on every GPU.

    Args:
        shape (tuple[int, int, int, int]): Shape of the map.
        channels (int): Largest number of channels of a program.
        numbers (int): How many numbers of a row a thread takes.

    Returns:
        tuple: The grid (blocks of channels, strips times runs of rows, images), and the
        arguments for sizes that these kernels share.
    """
    block_c = min(channels, block_size(shape[3], least=16))
    return _plan_strips(shape, _TOKENS, block_c, numbers, _LEAST_ROWS)


@functools.lru_cache(maxsize=_PLANS)
def plan_whole_strips(
    shape: Tuple[int, int, int, int],
) -> Tuple[Tuple[int, int, int], Dict[str, int]]:
    """Cut a map for a 3x3 stencil whose programs take all channels, at most 1024.

    A thread has 4 numbers of a row, so that a strip has as many columns as 512 threads
    can take, but at most 4. There are fewer programs for a row, so each takes fewer
    rows. See :func:`plan_strips`.
    """
    block_c = power_of_two(shape[3])
    return _plan_strips(shape, min(4, 2048 // block_c), block_c, 4, 2)


def _plan_strips(
    shape: Tuple[int, int, int, int],
    tokens: int,
    block_c: int,
    numbers: int,
    least_rows: int,
) -> Tuple[Tuple[int, int, int], Dict[str, int]]:
    number, height, width, all_channels = shape
    blocks, strips = ceil_div(all_channels, block_c), ceil_div(width, tokens)
    runs = min(_PROGRAMS // (blocks * strips * number), height // least_rows)
    rows = ceil_div(height, max(1, runs))
    sizes = dict(
        height=height,
        width=width,
        rows=rows,
        C=all_channels,
        TOKENS=tokens,
        BLOCK_C=block_c,
        num_warps=max(1, tokens * block_c // (32 * numbers)),
    )
    return (blocks, strips * ceil_div(height, rows), number), sizes


@functools.lru_cache
def plan_rows(channels: int, numbers: int) -> Dict[str, int]:
    """Arguments for tiles of whole rows (BLOCK, C), of about ``numbers`` numbers."""
    block_c = power_of_two(channels)
    return dict(
        C=channels, BLOCK=max(1, numbers // block_c), BLOCK_C=block_c, num_warps=4
    )


def block_size(size: int, least: int) -> int:
    """The largest power of two that divides a size, if it is at least ``least``.

    Otherwise the smallest power of two that covers the size, but at least 16. For 96
    channels the block is 32, because a part of the blocks of 64 would be idle.
    """
    divisor = size & -size
    return divisor if divisor >= least else max(16, power_of_two(size))


def as_rows(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N * H * W, C), channels side by side. Copies only if it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def operand_dtype(x: Tensor) -> tl.dtype:
    """The dtype of the factors of a matrix product, for a map.

    It is bfloat16 for a bfloat16 map, as in the definition. Otherwise it is float32,
    whose products are taken in TF32, because sums over tokens could overflow float16.
    Triton's interpreter has no products in bfloat16.
    """
    return tl.bfloat16 if x.dtype == torch.bfloat16 and x.is_cuda else tl.float32


def linear_operand(x: Tensor) -> tl.dtype:
    """The dtype of the factors of a linear layer of x, in half precision.

    They are what they are: no sum over tokens is a factor here.
    """
    return tl.float16 if x.dtype == torch.float16 else operand_dtype(x)


@triton.jit
def locate_strip(height, width, rows, TOKENS: tl.constexpr):
    """A program's rows, from the first to the one behind the last, and its columns."""
    strips = tl.cdiv(width, TOKENS)
    first = (tl.program_id(1) // strips) * rows
    columns = (tl.program_id(1) % strips) * TOKENS + tl.arange(0, TOKENS)
    return first, tl.minimum(first + rows, height), columns


@triton.jit
def strip_masks(columns, width, channel_mask):
    """Whether a token, and its neighbours to the left and to the right, are inside."""
    here = columns < width
    left = here & (columns > 0)
    right = columns < width - 1
    return (
        left[:, None] & channel_mask[None, :],
        here[:, None] & channel_mask[None, :],
        right[:, None] & channel_mask[None, :],
    )


@triton.jit
def load_row(pointers, stride, is_inside, masks):
    """A row's tokens moved by -1, 0 and 1 columns, as they are, zero outside the map.

    Args:
        pointers: Pointers to the tokens, (TOKENS, channels).
        stride: Elements from one token to the next.
        is_inside: Whether the row is in the map.
        masks: See :func:`strip_masks`.
    """
    return (
        tl.load(pointers - stride, mask=masks[0] & is_inside, other=0.0),
        tl.load(pointers, mask=masks[1] & is_inside, other=0.0),
        tl.load(pointers + stride, mask=masks[2] & is_inside, other=0.0),
    )


@triton.jit
def load_float(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def exp(x):
    """One instruction and a product; tl.exp and a quotient, below, take five each."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def reciprocal(x):
    """1 / x for x > 0, within a few units of the last place."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def silu(x):
    return x * reciprocal(1.0 + exp(-x))


@triton.jit
def silu_grad(x):
    sigmoid = reciprocal(1.0 + exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def load_taps(weight_ptr, channels, mask):
    """The nine weights of each channel, row by row, from (C, 1, 3, 3)."""
    taps = ()
    for i in tl.static_range(TAPS):
        taps += (load_float(weight_ptr + channels * TAPS + i, mask)[None, :],)
    return taps
