# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""3x3 depthwise convolution with bias, and the step that follows it.

With ``z = conv(x) + b``, one kernel goes down the rows of a strip and, for each row of
z, writes one of these:

- the layer: ``[x +] z`` or ``[x +] SiLU(z)``;
- the layer ``x + z``, and its LayerNorm. For this a program takes all channels;
- the gradient of z from the gradient e of SiLU(z): ``e SiLU'(z)``;
- the position encoding z, added to the attention a, and gated: ``(a + z) SiLU(g)``;
- the backward pass of the last one. If e is the gradient of the output, multiplied by
  the factor of stochastic depth, then ``e (a + z) SiLU'(g)`` is the gradient of g, and
  ``e SiLU(g)`` is that of a and z. The output is written again, because the gradient of
  the next weight needs it.

A row is read once, and added to the three rows of z that depend on it. So the kernel
holds sums for two rows, but no row. A second kernel computes the gradients of x, weight
and bias from the gradient of z.
"""

from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat.pytorch import linear_dtype
from .. import naive
from ._common import (
    SIZES,
    as_rows,
    load_float,
    load_row,
    load_taps,
    locate_strip,
    plan_strips,
    plan_whole_strips,
    silu,
    silu_grad,
    strip_masks,
)
from ._moves import Moves, statement_of
from ._sums import add_up

_LAYER, _SILU_GRAD, _GATE, _GATE_GRAD, _NORM = 0, 1, 2, 3, 4
# Channels of a program, and numbers of a row for each thread. The kernel of gradients
# holds ten sums for each number, so it takes fewer threads: there is less to add up.
_STRIP = dict(channels=64, numbers=4)
_STRIP_OF_SUMS = dict(channels=32, numbers=8)
# With 8 numbers of float32 the registers would not suffice.
_STRIP_OF_FLOAT32_SUMS = dict(channels=32, numbers=4)


#: Most channels of a map for :func:`conv_norm`.
MAX_NORM_CHANNELS = 1024


class DepthwiseConv(torch.autograd.Function):
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: bool,
        act: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.residual, ctx.act = residual, act
        return conv(x, weight, bias, residual, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple:
        x, weight, bias = ctx.saved_tensors
        grads = layer_grad(grad, x, weight, bias, ctx.residual, ctx.act)
        needed = zip(grads, ctx.needs_input_grad)
        return (*(grad if needs else None for grad, needs in needed), None, None)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: bool = False,
    act: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """``[x +] [SiLU](z)``. Without ``dtype`` in that of :func:`layer_dtype`."""
    dtype = layer_dtype(x, residual) if dtype is None else dtype
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _run(_LAYER, x, weight, bias, outputs=(y,), residual=residual, act=act)
    return y


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tuple[Tensor, Tensor]:
    """``x + z`` as of :func:`conv`, and its LayerNorm in the given dtype."""
    y = torch.empty(x.shape, dtype=layer_dtype(x, residual=True), device=x.device)
    normalised = torch.empty(x.shape, dtype=dtype, device=x.device)
    norm = norm_weight.contiguous(), norm_bias.contiguous(), eps
    outputs = y, normalised
    _run(_NORM, x, weight, bias, outputs=outputs, residual=True, norm=norm)
    return y, normalised


def layer_dtype(x: Tensor, residual: bool) -> torch.dtype:
    """The dtype of the layer's output, as the definition has it under autocast."""
    dtype = linear_dtype(x)
    return torch.promote_types(x.dtype, dtype) if residual else dtype


def layer_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool, act: bool
) -> Tuple[Tensor, ...]:
    """Gradients of x, weight and bias from that of the output of :func:`conv`."""
    grad_z = silu_conv_grad(x, weight, bias, grad) if act else grad
    added = grad if act and residual else None
    grad_x, sums = conv_grad(x, weight, grad_z, residual and not act, added)
    return grad_x, *add_up((sums, (weight, bias)))


def silu_conv_grad(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """``e SiLU'(z)``: the gradient of z, where ``grad`` is that of SiLU(z)."""
    grad_z = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    _run(_SILU_GRAD, x, weight, bias, grad=grad, outputs=(grad_z,))
    return grad_z


def gated_conv(
    x: Tensor, weight: Tensor, bias: Tensor, added: Tensor, gate: Tensor
) -> Tensor:
    """``(a + z) SiLU(g)``, where ``added`` is a."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(_GATE, x, weight, bias, added=added, gate=gate, outputs=(y,))
    return y


def gated_conv_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor,
    gate: Tensor,
    grad: Tensor,
    grad_gate: Tensor,
    scale: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """The backward pass of :func:`gated_conv`, except for x. It fills ``grad_gate``.

    ``scale`` has one number per image, in float32, and multiplies ``grad`` and the
    output. None means 1.

    Returns:
        tuple[Tensor, Tensor]: The gradient of both a and z, and the output.
    """
    grad_z, y = (
        torch.empty(x.shape, dtype=dtype, device=x.device)
        for dtype in (grad.dtype, x.dtype)
    )
    outputs = (grad_z, y, grad_gate)
    _run(_GATE_GRAD, x, weight, bias, added, gate, grad, scale, outputs)
    return grad_z, y


def _run(
    mode: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Optional[Tensor] = None,
    gate: Optional[Tensor] = None,
    grad: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    outputs: Tuple[Tensor, ...] = (),
    residual: bool = False,
    act: bool = False,
    norm: Tuple[Optional[Tensor], Optional[Tensor], float] = (None, None, 0.0),
) -> None:
    """Launch the first kernel. Pointers that it does not use get x."""
    rows = as_rows(x)
    added, gate, grad = (rows if y is None else as_rows(y) for y in (added, gate, grad))
    y, second, third = (*outputs, *[outputs[0]] * (3 - len(outputs)))
    if mode == _NORM:
        grid, sizes = plan_whole_strips(x.shape)
    else:
        grid, sizes = plan_strips(x.shape, **_STRIP)
    with torch.cuda.device_of(x):
        _conv_kernel[grid](
            rows,
            rows.stride(0),
            weight.contiguous(),
            bias.contiguous(),
            added,
            added.stride(0),
            gate,
            gate.stride(0),
            grad,
            grad.stride(0),
            scale,
            y,
            second,
            third,
            third.stride(-2),
            *norm,
            **sizes,
            MODE=mode,
            ACT=act,
            RESIDUAL=residual,
        )


def conv_grad(
    x: Tensor,
    weight: Tensor,
    grad_z: Tensor,
    residual: bool = False,
    added: Optional[Tensor] = None,
    out: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias in parts, from the gradient of z.

    Args:
        x (Tensor): (N, H, W, C).
        weight (Tensor): (C, 1, 3, 3).
        grad_z (Tensor): (N, H, W, C).
        residual (bool): Whether x was added to z. Then the gradient of z is added to
            that of x. Defaults to False.
        added (Tensor, optional): A gradient of x, which is added. Defaults to None.
        out (Tensor, optional): Memory for the gradient of x. It may be some channels of
            a wider map. None allocates a map. Defaults to None.

    Returns:
        tuple[Tensor, Tensor]: The gradient of x, and for :func:`add_up` the sums of
        each program, (programs, 10, C) in float32: nine for the weight, one for the
        bias.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, grads = as_rows(x), as_rows(grad_z)
    others = grads if added is None else as_rows(added)
    is_half = x.dtype in naive.HALF
    strip = _STRIP_OF_SUMS if is_half else _STRIP_OF_FLOAT32_SUMS
    grid, sizes = plan_strips(x.shape, **strip)
    # A row for each program and image, with ten sums for every channel.
    sums = x.new_empty((grid[1] * grid[2], 10, x.shape[-1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _conv_grad_kernel[grid](
            rows,
            rows.stride(0),
            weight.contiguous(),
            grads,
            grads.stride(0),
            others,
            others.stride(0),
            out,
            out.stride(-2),
            sums,
            **sizes,
            RESIDUAL=residual,
            ADD=added is not None,
        )
    return out, sums


@triton.jit(do_not_specialize=SIZES)
def _conv_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    added_ptr,
    added_stride,
    gate_ptr,
    gate_stride,
    grad_ptr,
    grad_stride,
    scale_ptr,
    y_ptr,
    second_ptr,
    third_ptr,
    third_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    height,
    width,
    rows,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    taps = load_taps(weight_ptr, channels, channel_mask)
    bias = load_float(bias_ptr + channels, channel_mask)[None, :]
    if MODE == 4:  # _NORM
        norm_weight = load_float(norm_weight_ptr + channels, channel_mask)[None, :]
        norm_bias = load_float(norm_bias_ptr + channels, channel_mask)[None, :]
    first, last, columns = locate_strip(height, width, rows, TOKENS)
    masks = strip_masks(columns, width, channel_mask)
    # The row before the first, which the first one sees.
    tokens = (tl.program_id(2).to(tl.int64) * height + first - 1) * width + columns
    x = x_ptr + tokens[:, None] * x_stride + channels[None, :]
    # What is written belongs to the row before the one that is read.
    tokens = tokens[:, None] - width
    current = load_row(x, x_stride, first > 0, masks)
    x += width * x_stride
    ahead = load_row(x, x_stride, first < height, masks)
    # Sums of the rows of z that have been seen in part: this one and the next.
    this = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    next = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    for row in range(first - 1, last + 1):
        # Read two rows ahead: numbers arrive while others are computed.
        x += width * x_stride
        far_ahead = load_row(x, x_stride, (row + 2 < height) & (row + 1 < last), masks)
        inside = masks[1] & (row > first)
        if MODE == 1 or MODE == 3:  # _SILU_GRAD, _GATE_GRAD
            grad = load_float(
                grad_ptr + tokens * grad_stride + channels[None, :], inside
            )
        if MODE == 2 or MODE == 3:  # _GATE, _GATE_GRAD
            added = load_float(
                added_ptr + tokens * added_stride + channels[None, :], inside
            )
            gate = load_float(
                gate_ptr + tokens * gate_stride + channels[None, :], inside
            )

        a = current[0].to(tl.float32)
        b = current[1].to(tl.float32)
        c = current[2].to(tl.float32)
        z = this + a * taps[6] + b * taps[7] + c * taps[8]
        this = next + a * taps[3] + b * taps[4] + c * taps[5]
        if RESIDUAL and not ACT:
            this += b
        next = bias + a * taps[0] + b * taps[1] + c * taps[2]
        current, ahead = ahead, far_ahead

        out = tokens * C + channels[None, :]
        if MODE == 0:  # _LAYER
            if ACT:
                z = silu(z)
                if RESIDUAL:
                    z += load_float(x - 3 * width * x_stride, inside)
            tl.store(y_ptr + out, z, mask=inside)
        elif MODE == 1:  # _SILU_GRAD
            tl.store(y_ptr + out, grad * silu_grad(z), mask=inside)
        elif MODE == 4:  # _NORM
            # Rounded as if it were read, and zero behind the last channel.
            z = z.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + out, z, mask=inside)
            z = z.to(tl.float32)
            z -= tl.sum(z, axis=1)[:, None] / C
            z = tl.where(channel_mask[None, :], z, 0.0)
            z *= tl.rsqrt(tl.sum(z * z, axis=1) / C + eps)[:, None]
            tl.store(second_ptr + out, z * norm_weight + norm_bias, mask=inside)
        elif MODE == 2:  # _GATE
            tl.store(y_ptr + out, (added + z) * silu(gate), mask=inside)
        else:  # _GATE_GRAD
            z += added
            if scale_ptr is not None:
                # Once for the gradients, and once for the output.
                scale = tl.load(scale_ptr + tl.program_id(2))
                grad *= scale
            third = tokens * third_stride + channels[None, :]
            tl.store(y_ptr + out, grad * silu(gate), mask=inside)
            tl.store(third_ptr + third, grad * z * silu_grad(gate), mask=inside)
            if scale_ptr is not None:
                z *= scale
            tl.store(second_ptr + out, z * silu(gate), mask=inside)
        tokens += width


@statement_of(_conv_kernel)
def _conv_moves(k: Any) -> Moves:
    size = k.x_ptr.numel()
    has_grad = k.MODE in (_SILU_GRAD, _GATE_GRAD)
    has_gate = k.MODE in (_GATE, _GATE_GRAD)
    return Moves(
        reads=dict(
            x_ptr=size,
            weight_ptr=9 * k.C,
            bias_ptr=k.C,
            added_ptr=size * has_gate,
            gate_ptr=size * has_gate,
            grad_ptr=size * has_grad,
            scale_ptr=size // (k.height * k.width * k.C),
            norm_weight_ptr=k.C,
            norm_bias_ptr=k.C,
        ),
        writes=dict(
            y_ptr=size,
            second_ptr=size * (k.MODE in (_GATE_GRAD, _NORM)),
            third_ptr=size * (k.MODE == _GATE_GRAD),
        ),
    )


@triton.jit(do_not_specialize=SIZES)
def _conv_grad_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    dz_ptr,
    dz_stride,
    added_ptr,
    added_stride,
    dx_ptr,
    dx_stride,
    sums_ptr,
    height,
    width,
    rows,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ADD: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    taps = load_taps(weight_ptr, channels, channel_mask)
    first, last, columns = locate_strip(height, width, rows, TOKENS)
    masks = strip_masks(columns, width, channel_mask)
    tokens = (tl.program_id(2).to(tl.int64) * height + first - 1) * width + columns
    dz = dz_ptr + tokens[:, None] * dz_stride + channels[None, :]
    x = x_ptr + tokens[:, None] * x_stride + channels[None, :]
    tokens = tokens[:, None] - width
    current = load_row(dz, dz_stride, first > 0, masks)
    dz += dz_stride * width
    ahead = load_row(dz, dz_stride, first < height, masks)
    x_ahead = tl.load(x + width * x_stride, mask=masks[1] & (first < last), other=0.0)
    this = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    next = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    # Of x the rows before, at and behind the one of dz; others' rows are left to them.
    x0 = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    x1 = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    zero = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    x += width * x_stride
    for row in range(first - 1, last + 1):
        dz += dz_stride * width
        x += x_stride * width
        far_ahead = load_row(
            dz, dz_stride, (row + 2 < height) & (row + 1 < last), masks
        )
        x2 = x_ahead.to(tl.float32)
        x_ahead = tl.load(x, mask=masks[1] & (row + 2 < last), other=0.0)
        inside = masks[1] & (row > first)
        if ADD:
            added = load_float(
                added_ptr + tokens * added_stride + channels[None, :], inside
            )

        a = current[0].to(tl.float32)
        b = current[1].to(tl.float32)
        c = current[2].to(tl.float32)
        # The output that sees an input through a tap lies on the tap's other side.
        dx = this + a * taps[2] + b * taps[1] + c * taps[0]
        this = next + a * taps[5] + b * taps[4] + c * taps[3]
        if RESIDUAL:
            this += b
        next = a * taps[8] + b * taps[7] + c * taps[6]
        own = tl.where((row >= first) & (row < last), b, 0.0)
        sums = (
            sums[0] + c * x0,
            sums[1] + b * x0,
            sums[2] + a * x0,
            sums[3] + c * x1,
            sums[4] + b * x1,
            sums[5] + a * x1,
            sums[6] + c * x2,
            sums[7] + b * x2,
            sums[8] + a * x2,
            sums[9] + own,
        )
        x0, x1, current, ahead = x1, x2, ahead, far_ahead
        if ADD:
            dx += added
        tl.store(dx_ptr + tokens * dx_stride + channels[None, :], dx, mask=inside)
        tokens += width
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    sums_ptr += program.to(tl.int64) * (10 * C) + channels
    for i in tl.static_range(10):
        tl.store(sums_ptr + i * C, tl.sum(sums[i], axis=0), mask=channel_mask)


@statement_of(_conv_grad_kernel)
def _conv_grad_moves(k: Any) -> Moves:
    size = k.x_ptr.numel()
    return Moves(
        reads=dict(x_ptr=size, weight_ptr=9 * k.C, dz_ptr=size, added_ptr=size * k.ADD),
        writes=dict(dx_ptr=size, sums_ptr=k.sums_ptr.numel()),
    )
