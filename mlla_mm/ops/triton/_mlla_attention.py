# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Linear attention with rotation, local position encoding and gate.

For one head, with q and k after ELU + 1, the rotation R_t of token t, and n tokens::

    A = sum_t (R_t k_t) v_t^T / n,   m = sum_t k_t / n           state, first pass
    z_t = 1 / (q_t . m + 1e-6),      y_t = z_t A^T R_t q_t       second pass
    out_t = (y_t + LePE(v)_t) SiLU(g_t)                          see _depthwise_conv.py

With the gradient p of y, the backward pass takes two passes over the tokens, too. The
first one is::

    o_t = z_t p_t,   dq~_t = A o_t,   ds_t = -z_t p_t . y_t
    dq_t = R_t^T dq~_t + ds_t m
    dA = sum_t (R_t q_t) o_t^T / n,   dm = sum_t ds_t q_t / n

The second one is::

    dk_t = R_t^T dA v_t + dm,   dv_t = dA^T R_t k_t

The state has d + 1 rows of d numbers for each image and head, in float32. If several
programs share an image, each has a partial sum of the state, and the next pass adds
them up. Products are in bfloat16 if the map is, as in the definition. Otherwise they
are in TF32 or float32, because the state could overflow float16.
"""

from typing import Any, Dict, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat.pytorch import products_use_tf32
from .. import naive
from ..rotary import axis_tables
from ._common import (
    SIZES,
    as_rows,
    ceil_div,
    exp,
    load_float,
    operand_dtype,
    power_of_two,
)
from ._depthwise_conv import conv_grad, gated_conv, gated_conv_grad
from ._moves import Moves, statement_of
from ._sums import add_up

_EPS = tl.constexpr(naive.EPS)

# Number of tokens in a tile, and of warps. The forward passes do not read a tile ahead
# (num_stages=1), because they would also read the rotation ahead, past the L1 cache.
_BLOCK, _NUM_WARPS = 32, 2
# Number of programs that keep a GPU busy. There are fewer if each has partial sums.
_PROGRAMS, _PROGRAMS_OF_SUMS = 4096, 1024
# With at most so many partial sums, every program of the next pass adds them up itself.
_MAX_PARTS = 4


class MLLAAttention(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
        num_heads: int,
    ) -> Tensor:
        y, states = linear_attention(qk, v, num_heads)
        ctx.save_for_backward(qk, v, gate, weight, bias, y, states)
        ctx.num_heads = num_heads
        return gated_conv(v, weight, bias, y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        qk, v, gate, weight, bias, y, states = ctx.saved_tensors
        grads = attention_grad(
            grad, qk, v, gate, weight, bias, y, states, ctx.num_heads
        )
        needed = zip(grads, ctx.needs_input_grad)
        return (*(grad if needs else None for grad, needs in needed), None)


def attention_grad(
    grad: Tensor,
    qk: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    states: Tensor,
    num_heads: int,
    tables: Optional[Tuple[Tensor, Tensor]] = None,
) -> Tuple[Tensor, ...]:
    """Gradients of the first five tensors behind that of the gated output.

    ``y``, ``states`` and ``tables`` are those of :func:`linear_attention`.
    """
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_y, _ = gated_conv_grad(v, weight, bias, y, gate, grad, grad_gate)
    grad_qk, grad_v = linear_attention_grad(qk, v, y, states, grad_y, num_heads, tables)
    grad_v, sums = conv_grad(v, weight, grad_y, added=grad_v)
    return (grad_qk, grad_v, grad_gate, *add_up((sums, (weight, bias))))


def linear_attention(
    qk: Tensor,
    v: Tensor,
    num_heads: int,
    tables: Optional[Tuple[Tensor, Tensor]] = None,
) -> Tuple[Tensor, Tensor]:
    """Linear attention in two passes over the tokens.

    Args:
        qk (Tensor): Queries, then keys, before the feature map, (N, H, W, 2C).
        v (Tensor): Values, (N, H, W, C).
        num_heads (int): Number of heads.
        tables (tuple[Tensor, Tensor], optional): Cosine and sine of the rotation,
            (positions, C / 4) in float32. None takes cached ones. Defaults to None.

    Returns:
        tuple[Tensor, Tensor]: y, (N, H, W, C), and partial sums of the state,
        (programs, N, heads, C / heads + 1, C / heads) in float32. The last row is m,
        the other rows are A.
    """
    qk_rows, v_rows = as_rows(qk), as_rows(v)
    grid, sizes = _plan(v, num_heads, _PROGRAMS_OF_SUMS)
    states = _empty_states(v, grid)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tables = tables or _tables(v)
    with torch.cuda.device_of(v):
        _state_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            v_rows,
            v_rows.stride(0),
            *tables,
            states,
            **sizes,
            num_stages=1,
        )
        states = _add_up_many(states)
        grid, sizes = _plan(v, num_heads, _PROGRAMS)
        _output_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            *tables,
            states,
            y,
            len(states),
            **sizes,
            num_stages=1,
        )
    return y, states


def linear_attention_grad(
    qk: Tensor,
    v: Tensor,
    y: Tensor,
    states: Tensor,
    grad: Tensor,
    num_heads: int,
    tables: Optional[Tuple[Tensor, Tensor]] = None,
) -> Tuple[Tensor, Tensor]:
    """The backward pass: gradients of ``qk`` and ``v``, contiguous.

    ``y`` and ``states`` are the results of :func:`linear_attention`, and ``grad`` is
    the gradient of y. For ``tables`` see there.
    """
    qk_rows, v_rows, grad_rows = as_rows(qk), as_rows(v), as_rows(grad)
    grid, sizes = _plan(v, num_heads, _PROGRAMS_OF_SUMS)
    if v.dtype not in naive.HALF:
        # The registers of fewer threads would not suffice.
        sizes['num_warps'] = 2 * _NUM_WARPS
    grad_states = _empty_states(v, grid)
    grad_qk = torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tables = tables or _tables(v)
    with torch.cuda.device_of(v):
        _query_grad_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            grad_rows,
            grad_rows.stride(0),
            y,
            *tables,
            states,
            grad_qk,
            grad_states,
            len(states),
            **sizes,
        )
        grad_states = _add_up_many(grad_states)
        grid, sizes = _plan(v, num_heads, _PROGRAMS)
        _key_value_grad_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            v_rows,
            v_rows.stride(0),
            *tables,
            grad_states,
            grad_qk,
            grad_v,
            len(grad_states),
            **sizes,
        )
    return grad_qk, grad_v


def _tables(v: Tensor) -> Tuple[Tensor, Tensor]:
    """Cosine and sine, (positions, C / 4), long enough for both rows and columns."""
    _, height, width, channels = v.shape
    return axis_tables(max(height, width), channels // 4, v.device, torch.float32)


def _empty_states(v: Tensor, grid: Tuple[int, int, int]) -> Tensor:
    """Memory for the partial sums of a state, or of its gradient."""
    num_heads, programs, number = grid
    dims = v.shape[-1] // num_heads
    shape = (programs, number, num_heads, dims + 1, dims)
    return v.new_empty(shape, dtype=torch.float32)


def _add_up_many(states: Tensor) -> Tensor:
    """Return few partial sums as they are, but the sum of many partial sums."""
    return states if len(states) <= _MAX_PARTS else states.sum(0, keepdim=True)


def _plan(
    v: Tensor, num_heads: int, programs: int
) -> Tuple[Tuple[int, int, int], Dict[str, object]]:
    """The grid (heads, programs per image, images), and arguments of every kernel.

    They depend on the sizes alone, so that sums have the same order on every GPU.
    """
    number, height, width, channels = v.shape
    all_tiles = ceil_div(height * width, _BLOCK)
    tiles = ceil_div(all_tiles, max(1, programs // (num_heads * number)))
    exact = v.dtype == torch.float32 and not products_use_tf32()
    dims = channels // num_heads
    sizes = dict(
        num_tokens=height * width,
        width=width,
        tiles=tiles,
        C=channels,
        D=dims,
        # A matrix product needs at least 16.
        BLOCK_D=max(16, power_of_two(dims)),
        BLOCK=_BLOCK,
        PRECISION='ieee' if exact else 'tf32',
        OPERAND=operand_dtype(v),
        num_warps=_NUM_WARPS,
    )
    return (num_heads, ceil_div(all_tiles, tiles), number), sizes


@triton.jit
def _locate(tile, num_tokens, width, C: tl.constexpr, D: tl.constexpr, BLOCK, BLOCK_D):
    """Where a tile of consecutive tokens of an image is.

    Returns:
        The tokens in the image and in the batch, (BLOCK,), the channels of the head,
        (BLOCK_D,), and whether both exist, (BLOCK, BLOCK_D).
    """
    tokens = tile * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    mask = (tokens < num_tokens)[:, None] & (dims < D)[None, :]
    in_batch = tl.program_id(2).to(tl.int64) * num_tokens + tokens
    return tokens, in_batch[:, None], (tl.program_id(0) * D + dims)[None, :], mask


@triton.jit
def _load_feature(pointers, mask):
    """ELU + 1."""
    x = load_float(pointers, mask)
    # Not the minimum with zero under the exponential: that would hide a NaN.
    return tl.where(x > 0, x + 1, exp(x))


@triton.jit
def _load_rotation(
    cos_ptr,
    sin_ptr,
    tokens,
    num_tokens,
    width,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D,
):
    """Cosines and sines for the head's pairs of channels, both (BLOCK, BLOCK_D / 2)."""
    # Numbered over all channels: a head can have pairs that rotate by row and others.
    pairs = tl.program_id(0) * (D // 2) + tl.arange(0, BLOCK_D // 2)
    rows, columns = tokens // width, tokens % width
    positions = tl.where(pairs[None, :] < C // 4, rows[:, None], columns[:, None])
    offsets = positions * (C // 4) + pairs[None, :] % (C // 4)
    mask = (tokens < num_tokens)[:, None] & (pairs[None, :] < C // 2)
    # Through the nearest cache: all tokens of a row or a column read the same.
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0, cache_modifier='.ca')
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0, cache_modifier='.ca')
    return cos, sin


def _rotation_moves(k: Any) -> Dict[str, int]:
    """Both tables, as long as the longer side of the map."""
    numbers = max(k.num_tokens // k.width, k.width) * (k.C // 4)
    return dict(cos_ptr=numbers, sin_ptr=numbers)


@triton.jit
def _rotate(x, cos, sin):
    """(a, b) -> (a cos - b sin, a sin + b cos) on neighbouring channels."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    rotated = tl.join(a * cos - b * sin, a * sin + b * cos)
    return tl.reshape(rotated, x.shape)


@triton.jit
def _load_state(state_ptr, parts, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A, (BLOCK_D, BLOCK_D), and m, (BLOCK_D,), of the program's image and head."""
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    slot = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    state_ptr += slot.to(tl.int64) * ((D + 1) * D) + dims
    step = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * ((D + 1) * D)
    matrix = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    vector = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(parts):
        matrix += load_float(
            state_ptr[None, :] + dims[:, None] * D, mask[:, None] & mask[None, :]
        )
        vector += load_float(state_ptr + D * D, mask)
        state_ptr += step
    return matrix, vector


@triton.jit
def _store_state(
    state_ptr, matrix, vector, scale, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write a program's share."""
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    slot = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    slot = slot.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    state_ptr += slot * ((D + 1) * D) + dims
    tl.store(
        state_ptr[None, :] + dims[:, None] * D,
        matrix * scale,
        mask=mask[:, None] & mask[None, :],
    )
    tl.store(state_ptr + D * D, vector * scale, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _state_kernel(
    qk_ptr,
    qk_stride,
    v_ptr,
    v_stride,
    cos_ptr,
    sin_ptr,
    states_ptr,
    num_tokens,
    width,
    tiles,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    matrix = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    k_sum = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, BLOCK))
    for tile in range(first, last):
        tokens, rows, channels, mask = _locate(
            tile, num_tokens, width, C, D, BLOCK, BLOCK_D
        )
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, tokens, num_tokens, width, C, D, BLOCK_D
        )
        k = _load_feature(qk_ptr + C + rows * qk_stride + channels, mask)
        v = load_float(v_ptr + rows * v_stride + channels, mask)
        rotated = tl.trans(_rotate(k, cos, sin).to(OPERAND))
        matrix = tl.dot(rotated, v.to(OPERAND), matrix, input_precision=PRECISION)
        k_sum += tl.where(mask, k, 0.0)
    _store_state(
        states_ptr, matrix, tl.sum(k_sum, axis=0), 1.0 / num_tokens, D, BLOCK_D
    )


@statement_of(_state_kernel)
def _state_moves(k: Any) -> Moves:
    size = k.v_ptr.numel()  # of qk the keys
    return Moves(
        reads=dict(qk_ptr=size, v_ptr=size, **_rotation_moves(k)),
        writes=dict(states_ptr=k.states_ptr.numel()),
        flops=2 * size * k.D,
    )


@triton.jit(do_not_specialize=SIZES)
def _output_kernel(
    qk_ptr,
    qk_stride,
    cos_ptr,
    sin_ptr,
    states_ptr,
    y_ptr,
    parts,
    num_tokens,
    width,
    tiles,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    matrix, k_mean = _load_state(states_ptr, parts, D, BLOCK_D)
    matrix = matrix.to(OPERAND)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, BLOCK))
    for tile in range(first, last):
        tokens, rows, channels, mask = _locate(
            tile, num_tokens, width, C, D, BLOCK, BLOCK_D
        )
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, tokens, num_tokens, width, C, D, BLOCK_D
        )
        q = _load_feature(qk_ptr + rows * qk_stride + channels, mask)
        inverse = 1.0 / (tl.sum(q * k_mean[None, :], axis=1) + _EPS)
        # Before the product: in half precision the sum stays in range.
        rotated = (_rotate(q, cos, sin) * inverse[:, None]).to(OPERAND)
        y = tl.dot(rotated, matrix, input_precision=PRECISION)
        tl.store(y_ptr + rows * C + channels, y, mask=mask)


@statement_of(_output_kernel)
def _output_moves(k: Any) -> Moves:
    size = k.y_ptr.numel()  # of qk the queries
    return Moves(
        reads=dict(qk_ptr=size, states_ptr=k.states_ptr.numel(), **_rotation_moves(k)),
        writes=dict(y_ptr=size),
        flops=2 * size * k.D,
    )


@triton.jit(do_not_specialize=SIZES)
def _query_grad_kernel(
    qk_ptr,
    qk_stride,
    dy_ptr,
    dy_stride,
    y_ptr,
    cos_ptr,
    sin_ptr,
    states_ptr,
    dqk_ptr,
    dstates_ptr,
    parts,
    num_tokens,
    width,
    tiles,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    matrix, k_mean = _load_state(states_ptr, parts, D, BLOCK_D)
    transposed = tl.trans(matrix.to(OPERAND))
    dmatrix = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    dk_mean = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, BLOCK))
    for tile in range(first, last):
        tokens, rows, channels, mask = _locate(
            tile, num_tokens, width, C, D, BLOCK, BLOCK_D
        )
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, tokens, num_tokens, width, C, D, BLOCK_D
        )
        q = _load_feature(qk_ptr + rows * qk_stride + channels, mask)
        dy = load_float(dy_ptr + rows * dy_stride + channels, mask)
        y = load_float(y_ptr + rows * C + channels, mask)
        inverse = 1.0 / (tl.sum(q * k_mean[None, :], axis=1) + _EPS)
        rotated = _rotate(q, cos, sin)
        dproduct = (dy * inverse[:, None]).to(OPERAND)
        drotated = tl.dot(dproduct, transposed, input_precision=PRECISION)
        dmatrix = tl.dot(
            tl.trans(rotated.to(OPERAND)), dproduct, dmatrix, input_precision=PRECISION
        )
        dnorm = -inverse * tl.sum(dy * y, axis=1)
        # Numbers of half the size change threads, and nothing is computed twice.
        drotated = drotated.to(OPERAND).to(tl.float32)
        dq = _rotate(drotated, cos, -sin) + dnorm[:, None] * k_mean[None, :]
        # q is ELU + 1, whose derivative is q up to 1.
        dq *= tl.minimum(q, 1.0)
        tl.store(dqk_ptr + rows * (2 * C) + channels, dq, mask=mask)
        dk_mean += dnorm[:, None] * q
    _store_state(
        dstates_ptr, dmatrix, tl.sum(dk_mean, axis=0), 1.0 / num_tokens, D, BLOCK_D
    )


@statement_of(_query_grad_kernel)
def _query_grad_moves(k: Any) -> Moves:
    size = k.y_ptr.numel()  # of qk and its gradient the queries
    return Moves(
        reads=dict(
            qk_ptr=size,
            dy_ptr=size,
            y_ptr=size,
            states_ptr=k.states_ptr.numel(),
            **_rotation_moves(k),
        ),
        writes=dict(dqk_ptr=size, dstates_ptr=k.dstates_ptr.numel()),
        flops=2 * 2 * size * k.D,
    )


@triton.jit(do_not_specialize=SIZES)
def _key_value_grad_kernel(
    qk_ptr,
    qk_stride,
    v_ptr,
    v_stride,
    cos_ptr,
    sin_ptr,
    dstates_ptr,
    dqk_ptr,
    dv_ptr,
    parts,
    num_tokens,
    width,
    tiles,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    dmatrix, dk_mean = _load_state(dstates_ptr, parts, D, BLOCK_D)
    dmatrix = dmatrix.to(OPERAND)
    transposed = tl.trans(dmatrix)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, BLOCK))
    for tile in range(first, last):
        tokens, rows, channels, mask = _locate(
            tile, num_tokens, width, C, D, BLOCK, BLOCK_D
        )
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, tokens, num_tokens, width, C, D, BLOCK_D
        )
        k = _load_feature(qk_ptr + C + rows * qk_stride + channels, mask)
        v = load_float(v_ptr + rows * v_stride + channels, mask)
        rotated = _rotate(k, cos, sin).to(OPERAND)
        dk = tl.dot(v.to(OPERAND), transposed, input_precision=PRECISION)
        dv = tl.dot(rotated, dmatrix, input_precision=PRECISION)
        dk = (_rotate(dk, cos, -sin) + dk_mean[None, :]) * tl.minimum(k, 1.0)
        tl.store(dqk_ptr + C + rows * (2 * C) + channels, dk, mask=mask)
        tl.store(dv_ptr + rows * C + channels, dv, mask=mask)


@statement_of(_key_value_grad_kernel)
def _key_value_grad_moves(k: Any) -> Moves:
    size = k.v_ptr.numel()  # of qk and its gradient the keys
    return Moves(
        reads=dict(
            qk_ptr=size,
            v_ptr=size,
            dstates_ptr=k.dstates_ptr.numel(),
            **_rotation_moves(k),
        ),
        writes=dict(dqk_ptr=size, dv_ptr=size),
        flops=2 * 2 * size * k.D,
    )
