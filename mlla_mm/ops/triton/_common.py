# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the kernels share: tiles of a feature map and the 3x3 stencil.

A feature map (N, H, W, C) is cut into tiles of ``BLOCK`` tokens, 8 columns wide, of one
image. Tiles are numbered down a strip of columns, then strip after strip, and a program
goes through consecutive ones: the two rows that neighbouring tiles share are still in
the cache. Tokens outside the map are masked.
"""

from typing import NamedTuple, Tuple

import triton
import triton.language as tl
from torch import Tensor

TILE_WIDTH = tl.constexpr(8)

#: Sizes that change from image to image must not each compile a kernel of their own.
SIZES = ['height', 'width', 'tiles_per_program']


class Tiling(NamedTuple):
    """How the tiles of an image are dealt out to programs."""

    programs: int
    tiles_per_program: int


def deal_tiles(
    height: int, width: int, block: int, others: int, programs: int, least: int
) -> Tiling:
    """Choose how many programs share an image.

    The choice depends on sizes alone, so that sums are taken in the same order
    everywhere.

    Args:
        height (int): Height of the map in tokens.
        width (int): Width of the map in tokens.
        block (int): Tokens of a tile.
        others (int): What the number of programs is multiplied by: images times heads
            or blocks of channels.
        programs (int): Programs wanted in all, to keep a GPU busy.
        least (int): Tiles that a program should have at least, to be worth its start
            and its partial sums.

    Returns:
        Tiling: Programs for an image and tiles for each.
    """
    tiles = _ceil_div(height, block // TILE_WIDTH.value) * _ceil_div(
        width, TILE_WIDTH.value
    )
    per_program = max(least, _ceil_div(tiles * others, programs))
    return Tiling(_ceil_div(tiles, per_program), per_program)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def as_rows(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N * H * W, C) with neighbouring channels; rarely a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def reduce_sums(sums: Tensor, weight: Tensor, bias: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of a convolution from the partial sums (P, 10, C) of its kernel."""
    sums = sums.sum(0)
    grad_weight = sums[:9].t().reshape(weight.shape).to(weight.dtype)
    return grad_weight, sums[9].to(bias.dtype)


@triton.jit
def tile_range(program, tiles_per_program, height, width, BLOCK: tl.constexpr):
    """First tile of a program, and the one behind its last."""
    tiles = tl.cdiv(height, BLOCK // TILE_WIDTH) * tl.cdiv(width, TILE_WIDTH)
    first = program * tiles_per_program
    return first, tl.minimum(first + tiles_per_program, tiles)


@triton.jit
def locate(image, tile, height, width, BLOCK: tl.constexpr):
    """Where the tokens of a tile are.

    Returns:
        The rows and columns in the image, the numbers in the batch, and whether the
        tokens are inside the map, all (BLOCK,). The numbers are int64, since they are
        multiplied by the channels.
    """
    tile_rows = tl.cdiv(height, BLOCK // TILE_WIDTH)
    index = tl.arange(0, BLOCK)
    rows = (tile % tile_rows) * (BLOCK // TILE_WIDTH) + index // TILE_WIDTH
    columns = (tile // tile_rows) * TILE_WIDTH + index % TILE_WIDTH
    tokens = (image.to(tl.int64) * height + rows) * width + columns
    return rows, columns, tokens, (rows < height) & (columns < width)


@triton.jit
def load_float(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_grad(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def load_taps(weight_ptr, channels, mask):
    """The nine weights of each channel, row by row, from (C, 1, 3, 3)."""
    taps = ()
    for i in tl.static_range(9):
        taps += (load_float(weight_ptr + channels * 9 + i, mask),)
    return taps


@triton.jit
def load_neighbour(
    pointers,
    stride,
    rows,
    columns,
    channel_mask,
    height,
    width,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """A tile moved by some rows and columns, zero outside the map.

    Args:
        pointers: Pointers to the tile, (BLOCK, channels).
        stride: Elements from one token to the next.
    """
    rows += DOWN
    columns += RIGHT
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return load_float(
        pointers + (DOWN * width + RIGHT) * stride,
        inside[:, None] & channel_mask[None, :],
    )


@triton.jit
def conv3x3(pointers, stride, rows, columns, channel_mask, height, width, taps):
    """Depthwise convolution at the tokens of a tile, (BLOCK, channels) in float32."""
    y = tl.zeros(pointers.shape, tl.float32)
    for i in tl.static_range(9):
        x = load_neighbour(
            pointers,
            stride,
            rows,
            columns,
            channel_mask,
            height,
            width,
            i // 3 - 1,
            i % 3 - 1,
        )
        y += x * taps[i][None, :]
    return y


@triton.jit
def zero_sums(BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where :func:`conv3x3_grad` starts: nine sums for the weight, one for the bias."""
    zero = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    return (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def conv3x3_grad(
    grads, stride, rows, columns, channel_mask, height, width, taps, x, sums
):
    """Gradients of a depthwise convolution from one read of the output's gradient.

    Args:
        grads: Pointers to the output's gradient at the tile, (BLOCK, channels).
        stride: Its elements from one token to the next.
        taps: The weights.
        x: The input at the tile, zero outside the map.
        sums: See :func:`zero_sums`. They are kept per token of a tile, so that threads
            add them up once, at the end.

    Returns:
        The input's gradient at the tile, and the sums with the tile's share.
    """
    dx = tl.zeros(x.shape, tl.float32)
    new_sums = ()
    for i in tl.static_range(9):
        # The output that sees this input through a tap lies on the tap's other side.
        dy = load_neighbour(
            grads,
            stride,
            rows,
            columns,
            channel_mask,
            height,
            width,
            1 - i // 3,
            1 - i % 3,
        )
        dx += dy * taps[i][None, :]
        new_sums += (sums[i] + x * dy,)
    dy = load_neighbour(grads, stride, rows, columns, channel_mask, height, width, 0, 0)
    return dx, new_sums + (sums[9] + dy,)


@triton.jit
def store_sums(pointers, mask, sums, C: tl.constexpr):
    """Write a program's sums, (10, C)."""
    for i in tl.static_range(10):
        tl.store(pointers + i * C, tl.sum(sums[i], axis=0), mask=mask)
