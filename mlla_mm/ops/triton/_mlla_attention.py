# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Linear attention with rotation, local position encoding and gate.

For one head, with q and k behind ELU + 1, R_t the rotation of token t, n tokens::

    A = sum_t (R_t k_t) v_t^T / n,   m = sum_t k_t / n           state, first pass
    z_t = 1 / (q_t . m + 1e-6),      y_t = z_t A^T R_t q_t
    out_t = (y_t + LePE(v)_t) * SiLU(g_t)                        second pass

Backward, with e the gradient of out, takes two passes as well. The first recomputes y::

    dg_t = e_t (y_t + LePE(v)_t) SiLU'(g_t),   p_t = e_t SiLU(g_t),   o_t = p_t z_t
    ds_t = -z_t p_t . y_t,   dq_t = R_t^T A o_t + ds_t m
    dA = sum_t (R_t q_t) o_t^T / n,   dm = sum_t ds_t q_t / n

and the second::

    dk_t = R_t^T dA v_t + dm,   dv_t = dA^T R_t k_t + LePE^T(p)_t

Only the state, d + 1 rows of d numbers per image and head, is kept for it. The state is
in float32 and its products in TF32 at least: as a float16 number it could overflow.
"""

from typing import Dict, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import naive
from ..rotary import axis_tables
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

_EPS = tl.constexpr(naive.EPS)

# Tokens of a tile, as many as registers hold for a head of 32 channels. The last kernel
# keeps ten sums for each token and channel.
_STATE_BLOCK, _OUTPUT_BLOCK = 64, 32
_QUERY_GRAD_BLOCK, _KEY_VALUE_GRAD_BLOCK = 64, 16


class MLLAAttention(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        qk: Tensor,
        v: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
        num_heads: int,
    ) -> Tensor:
        state = _state(qk, v, num_heads)
        y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        qk_rows, v_rows, gate_rows = as_rows(qk), as_rows(v), as_rows(gate)
        grid, sizes = _plan(v, num_heads, _OUTPUT_BLOCK, programs=4096, least=1)
        with torch.cuda.device_of(v):
            _output_kernel[grid](
                qk_rows,
                qk_rows.stride(0),
                v_rows,
                v_rows.stride(0),
                gate_rows,
                gate_rows.stride(0),
                *_tables(v),
                weight.contiguous(),
                bias.contiguous(),
                state,
                y,
                **sizes,
                num_warps=4,
                num_stages=1,
            )
        ctx.save_for_backward(qk, v, gate, weight, bias, state)
        ctx.num_heads = num_heads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tuple:
        qk, v, gate, weight, bias, state = ctx.saved_tensors
        grad_qk = torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
        grad_gate, grad_y, grad_state = _query_grad(
            qk, v, gate, weight, bias, state, grad, grad_qk
        )
        grad_v, sums = _key_value_grad(qk, v, weight, grad_state, grad_y, grad_qk)
        grads = (grad_qk, grad_v, grad_gate, *reduce_sums(sums, weight, bias))
        needed = zip(grads, ctx.needs_input_grad)
        return (*(grad if needs else None for grad, needs in needed), None)


def _state(qk: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """A, then m as its last row: (N, heads, C / heads + 1, C / heads) in float32."""
    grid, sizes = _plan(v, num_heads, _STATE_BLOCK, programs=1024, least=4)
    states = _empty_states(v, grid)
    qk_rows, v_rows = as_rows(qk), as_rows(v)
    with torch.cuda.device_of(v):
        _state_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            v_rows,
            v_rows.stride(0),
            *_tables(v),
            states,
            **sizes,
            num_warps=4,
        )
    return states.sum(0)


def _query_grad(
    qk: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor,
    grad: Tensor,
    grad_qk: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """First pass back; fills the queries' half of ``grad_qk``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Gradients of the gate, of what the gate
        multiplies, both (N, H, W, C), and of the state.
    """
    num_heads = state.shape[1]
    grid, sizes = _plan(v, num_heads, _QUERY_GRAD_BLOCK, programs=1024, least=4)
    grad_states = _empty_states(v, grid)
    grad_gate = torch.empty(v.shape, dtype=gate.dtype, device=v.device)
    grad_y = torch.empty(v.shape, dtype=grad.dtype, device=v.device)
    qk_rows, v_rows, gate_rows = as_rows(qk), as_rows(v), as_rows(gate)
    grad_rows = as_rows(grad)
    with torch.cuda.device_of(v):
        _query_grad_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            v_rows,
            v_rows.stride(0),
            gate_rows,
            gate_rows.stride(0),
            grad_rows,
            grad_rows.stride(0),
            *_tables(v),
            weight.contiguous(),
            bias.contiguous(),
            state,
            grad_qk,
            grad_gate,
            grad_y,
            grad_states,
            **sizes,
            num_warps=8,
            num_stages=1,
        )
    return grad_gate, grad_y, grad_states.sum(0)


def _key_value_grad(
    qk: Tensor,
    v: Tensor,
    weight: Tensor,
    grad_state: Tensor,
    grad_y: Tensor,
    grad_qk: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Second pass back; fills the keys' half of ``grad_qk``.

    Returns:
        tuple[Tensor, Tensor]: Gradient of the values, (N, H, W, C), and partial sums of
        those of LePE's weight and bias, (programs, 10, C).
    """
    num_heads = grad_state.shape[1]
    grid, sizes = _plan(v, num_heads, _KEY_VALUE_GRAD_BLOCK, programs=2048, least=8)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sums = v.new_empty((grid[1] * grid[2], 10, v.shape[-1]), dtype=torch.float32)
    qk_rows, v_rows = as_rows(qk), as_rows(v)
    with torch.cuda.device_of(v):
        _key_value_grad_kernel[grid](
            qk_rows,
            qk_rows.stride(0),
            v_rows,
            v_rows.stride(0),
            grad_y,
            *_tables(v),
            weight.contiguous(),
            grad_state,
            grad_qk,
            grad_v,
            sums,
            **sizes,
            num_warps=4,
            num_stages=1,
        )
    return grad_v, sums


def _tables(v: Tensor) -> Tuple[Tensor, Tensor]:
    """Cosine and sine for rows and columns alike, (positions, C / 4)."""
    _, height, width, channels = v.shape
    return axis_tables(max(height, width), channels // 4, v.device, torch.float32)


def _empty_states(v: Tensor, grid: Tuple[int, int, int]) -> Tensor:
    """Room for the shares that programs have in a state or in its gradient."""
    num_heads, programs, number = grid
    dims = v.shape[-1] // num_heads
    shape = (programs, number, num_heads, dims + 1, dims)
    return v.new_empty(shape, dtype=torch.float32)


def _plan(
    v: Tensor, num_heads: int, block: int, programs: int, least: int
) -> Tuple[Tuple[int, int, int], Dict[str, object]]:
    """The grid (heads, programs per image, images), and what every kernel is told."""
    number, height, width, channels = v.shape
    tiling = deal_tiles(height, width, block, num_heads * number, programs, least)
    exact = v.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    dims = channels // num_heads
    sizes = dict(
        height=height,
        width=width,
        tiles_per_program=tiling.tiles_per_program,
        C=channels,
        D=dims,
        # A matrix product needs at least 16.
        BLOCK_D=max(16, triton.next_power_of_2(dims)),
        BLOCK=block,
        PRECISION='ieee' if exact else 'tf32',
    )
    return (num_heads, tiling.programs, number), sizes


@triton.jit
def _load_feature(pointers, mask):
    """ELU + 1, and zero where masked."""
    x = load_float(pointers, mask)
    # Not the minimum with zero under the exponential: that would hide a NaN.
    return tl.where(mask, tl.where(x > 0, x + 1, tl.exp(x)), 0.0)


@triton.jit
def _load_rotation(
    cos_ptr, sin_ptr, rows, columns, inside, C: tl.constexpr, D: tl.constexpr, BLOCK_D
):
    """Cosines and sines for the head's pairs of channels, both (BLOCK, BLOCK_D / 2)."""
    # Numbered over all channels: a head can have pairs that rotate by row and others.
    pairs = tl.program_id(0) * (D // 2) + tl.arange(0, BLOCK_D // 2)
    positions = tl.where(pairs[None, :] < C // 4, rows[:, None], columns[:, None])
    offsets = positions * (C // 4) + pairs[None, :] % (C // 4)
    mask = inside[:, None] & (pairs[None, :] < C // 2)
    return load_float(cos_ptr + offsets, mask), load_float(sin_ptr + offsets, mask)


@triton.jit
def _rotate(x, cos, sin):
    """(a, b) -> (a cos - b sin, a sin + b cos) on neighbouring channels."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    rotated = tl.join(a * cos - b * sin, a * sin + b * cos)
    return tl.reshape(rotated, x.shape)


@triton.jit
def _load_state(state_ptr, slot, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A, (BLOCK_D, BLOCK_D), and m, (BLOCK_D,), of one image and head."""
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    state_ptr += slot.to(tl.int64) * ((D + 1) * D) + dims
    matrix = load_float(state_ptr[None, :] + dims[:, None] * D, mask[:, None] & mask)
    return matrix, load_float(state_ptr + D * D, mask)


@triton.jit
def _store_state(
    state_ptr, slot, matrix, vector, scale, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    state_ptr += slot.to(tl.int64) * ((D + 1) * D) + dims
    tl.store(
        state_ptr[None, :] + dims[:, None] * D,
        matrix * scale,
        mask=mask[:, None] & mask,
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
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, image = tl.program_id(0), tl.program_id(2)
    channels = head * D + tl.arange(0, BLOCK_D)
    channel_mask = tl.arange(0, BLOCK_D) < D
    matrix = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    k_sum = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(image, tile, height, width, BLOCK)
        mask = inside[:, None] & channel_mask[None, :]
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, rows, columns, inside, C, D, BLOCK_D
        )
        k_ptr = qk_ptr + C + tokens[:, None] * qk_stride + channels[None, :]
        k = _load_feature(k_ptr, mask)
        v = load_float(v_ptr + tokens[:, None] * v_stride + channels[None, :], mask)
        rotated = tl.trans(_rotate(k, cos, sin))
        matrix = tl.dot(rotated, v, matrix, input_precision=PRECISION)
        k_sum += k
    scale = 1.0 / (height * width)
    slot = (tl.program_id(1) * tl.num_programs(2) + image) * tl.num_programs(0) + head
    _store_state(states_ptr, slot, matrix, tl.sum(k_sum, axis=0), scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _output_kernel(
    qk_ptr,
    qk_stride,
    v_ptr,
    v_stride,
    gate_ptr,
    gate_stride,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    y_ptr,
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, image = tl.program_id(0), tl.program_id(2)
    channels = head * D + tl.arange(0, BLOCK_D)
    channel_mask = tl.arange(0, BLOCK_D) < D
    taps = load_taps(weight_ptr, channels, channel_mask)
    bias = load_float(bias_ptr + channels, channel_mask)
    slot = image * tl.num_programs(0) + head
    matrix, k_mean = _load_state(state_ptr, slot, D, BLOCK_D)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(image, tile, height, width, BLOCK)
        mask = inside[:, None] & channel_mask[None, :]
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, rows, columns, inside, C, D, BLOCK_D
        )
        q = _load_feature(
            qk_ptr + tokens[:, None] * qk_stride + channels[None, :], mask
        )
        norm = tl.sum(q * k_mean[None, :], axis=1) + _EPS
        y = tl.dot(_rotate(q, cos, sin), matrix, input_precision=PRECISION)
        y = y / norm[:, None] + bias[None, :]
        v = v_ptr + tokens[:, None] * v_stride + channels[None, :]
        y += conv3x3(v, v_stride, rows, columns, channel_mask, height, width, taps)
        gate = load_float(
            gate_ptr + tokens[:, None] * gate_stride + channels[None, :], mask
        )
        y *= silu(gate)
        tl.store(y_ptr + tokens[:, None] * C + channels[None, :], y, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _query_grad_kernel(
    qk_ptr,
    qk_stride,
    v_ptr,
    v_stride,
    gate_ptr,
    gate_stride,
    grad_ptr,
    grad_stride,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    dqk_ptr,
    dgate_ptr,
    dy_ptr,
    dstates_ptr,
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, image = tl.program_id(0), tl.program_id(2)
    channels = head * D + tl.arange(0, BLOCK_D)
    channel_mask = tl.arange(0, BLOCK_D) < D
    taps = load_taps(weight_ptr, channels, channel_mask)
    bias = load_float(bias_ptr + channels, channel_mask)
    slot = image * tl.num_programs(0) + head
    matrix, k_mean = _load_state(state_ptr, slot, D, BLOCK_D)
    dmatrix = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    dk_mean = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(image, tile, height, width, BLOCK)
        mask = inside[:, None] & channel_mask[None, :]
        out = tokens[:, None] * C + channels[None, :]
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, rows, columns, inside, C, D, BLOCK_D
        )
        q = _load_feature(
            qk_ptr + tokens[:, None] * qk_stride + channels[None, :], mask
        )
        inverse = 1.0 / (tl.sum(q * k_mean[None, :], axis=1) + _EPS)
        rotated = _rotate(q, cos, sin)
        y = tl.dot(rotated, matrix, input_precision=PRECISION) * inverse[:, None]

        gate = load_float(
            gate_ptr + tokens[:, None] * gate_stride + channels[None, :], mask
        )
        grad = load_float(
            grad_ptr + tokens[:, None] * grad_stride + channels[None, :], mask
        )
        v = v_ptr + tokens[:, None] * v_stride + channels[None, :]
        lepe = conv3x3(v, v_stride, rows, columns, channel_mask, height, width, taps)
        dgate = grad * (y + lepe + bias[None, :]) * silu_grad(gate)
        tl.store(dgate_ptr + out, dgate, mask=mask)
        dy = grad * silu(gate)
        tl.store(dy_ptr + out, dy, mask=mask)

        dproduct = dy * inverse[:, None]
        dnorm = -inverse * tl.sum(dy * y, axis=1)
        dq = tl.dot(dproduct, tl.trans(matrix), input_precision=PRECISION)
        dq = _rotate(dq, cos, -sin) + dnorm[:, None] * k_mean[None, :]
        # q is ELU + 1, whose derivative is q up to 1.
        dq *= tl.minimum(q, 1.0)
        tl.store(dqk_ptr + out + tokens[:, None] * C, dq, mask=mask)
        dmatrix = tl.dot(
            tl.trans(rotated), dproduct, dmatrix, input_precision=PRECISION
        )
        dk_mean += dnorm[:, None] * q
    scale = 1.0 / (height * width)
    slot = (tl.program_id(1) * tl.num_programs(2) + image) * tl.num_programs(0) + head
    dk_mean = tl.sum(dk_mean, axis=0)
    _store_state(dstates_ptr, slot, dmatrix, dk_mean, scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _key_value_grad_kernel(
    qk_ptr,
    qk_stride,
    v_ptr,
    v_stride,
    dy_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    dstate_ptr,
    dqk_ptr,
    dv_ptr,
    sums_ptr,
    height,
    width,
    tiles_per_program,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, image = tl.program_id(0), tl.program_id(2)
    channels = head * D + tl.arange(0, BLOCK_D)
    channel_mask = tl.arange(0, BLOCK_D) < D
    taps = load_taps(weight_ptr, channels, channel_mask)
    slot = image * tl.num_programs(0) + head
    dmatrix, dk_mean = _load_state(dstate_ptr, slot, D, BLOCK_D)
    sums = zero_sums(BLOCK, BLOCK_D)
    first, last = tile_range(tl.program_id(1), tiles_per_program, height, width, BLOCK)
    for tile in range(first, last):
        rows, columns, tokens, inside = locate(image, tile, height, width, BLOCK)
        mask = inside[:, None] & channel_mask[None, :]
        out = tokens[:, None] * C + channels[None, :]
        cos, sin = _load_rotation(
            cos_ptr, sin_ptr, rows, columns, inside, C, D, BLOCK_D
        )
        k_ptr = qk_ptr + C + tokens[:, None] * qk_stride + channels[None, :]
        k = _load_feature(k_ptr, mask)
        v = load_float(v_ptr + tokens[:, None] * v_stride + channels[None, :], mask)

        dk = tl.dot(v, tl.trans(dmatrix), input_precision=PRECISION)
        dk = _rotate(dk, cos, -sin) + dk_mean[None, :]
        dk *= tl.minimum(k, 1.0)
        tl.store(dqk_ptr + C + out + tokens[:, None] * C, dk, mask=mask)

        dv, sums = conv3x3_grad(
            dy_ptr + out, C, rows, columns, channel_mask, height, width, taps, v, sums
        )
        rotated = _rotate(k, cos, sin)
        dv = tl.dot(rotated, dmatrix, dv, input_precision=PRECISION)
        tl.store(dv_ptr + out, dv, mask=mask)
    program = image * tl.num_programs(1) + tl.program_id(1)
    sums_ptr += program.to(tl.int64) * (10 * C) + channels
    store_sums(sums_ptr, channel_mask, sums, C)
