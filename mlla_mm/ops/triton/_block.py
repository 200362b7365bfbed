# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A whole MLLA block, forward and backward, by the kernels of this package.

One autograd function replaces a dozen. The result of each layer is written once, in the
dtype of autocast, and gradients of residual connections are added inside the kernels.
PyTorch computes the matrix products that no other step follows.
"""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat.pytorch import linear_dtype
from .. import casts
from ._depthwise_conv import (
    MAX_NORM_CHANNELS,
    conv,
    conv_grad,
    conv_norm,
    gated_conv,
    gated_conv_grad,
    silu_conv_grad,
)
from ._layer_norm import layer_norm, layer_norm_residual_grad
from ._linear import gelu_linear_grad, linear_gelu, linear_residual, weight_grad
from ._mlla_attention import linear_attention, linear_attention_grad
from ._norm_linear import fits, mlp, norm_linear
from ._sums import add_up, column_sums


class Weights(NamedTuple):
    """Weight and bias of each layer of :class:`mlla_mm.models.layers.MLLABlock`."""

    cpe1: Tensor
    cpe1_bias: Tensor
    norm1: Tensor
    norm1_bias: Tensor
    in_proj: Tensor
    in_proj_bias: Tensor
    act_proj: Tensor
    act_proj_bias: Tensor
    dwc: Tensor
    dwc_bias: Tensor
    qk: Tensor
    qk_bias: Optional[Tensor]
    lepe: Tensor
    lepe_bias: Tensor
    out_proj: Tensor
    out_proj_bias: Tensor
    cpe2: Tensor
    cpe2_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class _Products(NamedTuple):
    """Weights and biases of the matrix products, in the dtype of the products."""

    in_act: Tensor
    in_act_bias: Tensor
    qk: Tensor
    qk_bias: Optional[Tensor]
    out: Tensor
    out_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class MLLABlock(torch.autograd.Function):
    """See :func:`mlla_mm.ops.triton.mlla_block`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        num_heads: int,
        eps: Tuple[float, float],
        scales: Tuple[Optional[Tensor], Optional[Tensor]],
        merged: bool,
        *parameters: Optional[Tensor],
    ) -> Tensor:
        weights = Weights._make(parameters)
        out, kept, products = forward(
            x, num_heads, eps, scales, weights, keep=True, merged=merged
        )
        ctx.save_for_backward(*kept, *products, *scales, *parameters)
        ctx.num_heads, ctx.eps = num_heads, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        saved = ctx.saved_tensors
        kept, saved = saved[:_NUM_KEPT], saved[_NUM_KEPT:]
        count = len(_Products._fields)
        products, saved = _Products(*saved[:count]), saved[count:]
        scales, parameters = saved[:2], saved[2:]
        weights = Weights._make(parameters)
        with torch.autocast(grad.device.type, enabled=False):
            grad_x, grads = backward(
                grad, kept, ctx.num_heads, ctx.eps, scales, weights, products
            )
        needed = zip(grads, ctx.needs_input_grad[5:])
        wanted = [grad if needs else None for grad, needs in needed]
        return (grad_x, None, None, None, None, *wanted)


_NUM_KEPT = 10


def forward(
    x: Tensor,
    num_heads: int,
    eps: Tuple[float, float],
    scales: Sequence[Optional[Tensor]],
    w: Weights,
    keep: bool,
    merged: bool,
) -> Tuple[Tensor, Tuple[Optional[Tensor], ...], _Products]:
    """The forward pass.

    ``merged`` also takes the kernels of several layers: LayerNorm with the linear
    layers behind it where there are few channels, and elsewhere with the convolution
    before it. ``keep`` keeps what the backward pass needs.

    Returns:
        tuple: The output, the tensors that the backward pass needs, and the parameters
        of the matrix products.
    """
    dtype = linear_dtype(x)
    products = _cast(w, dtype)
    channels = x.shape[-1]
    narrow = merged and fits(channels, dtype)
    # The factors of each product have one dtype, so autocast casts nothing.
    norm = w.norm1, w.norm1_bias, eps[0]
    if narrow:
        x1 = conv(x, w.cpe1, w.cpe1_bias, residual=True)
        projected = norm_linear(x1, *norm, products.in_act, products.in_act_bias)
    else:
        x1, u = conv_and_norm(x, w.cpe1, w.cpe1_bias, *norm, dtype, merged)
        projected = F.linear(u, products.in_act, products.in_act_bias)
    inner, gate = projected.split(channels, dim=-1)
    v = conv(inner, w.dwc, w.dwc_bias, act=True)
    qk = F.linear(v, products.qk, products.qk_bias)
    y, states = linear_attention(qk, v, num_heads)
    gated = gated_conv(v, w.lepe, w.lepe_bias, y, gate)
    x2 = linear_residual(
        gated.view(-1, channels), products.out, products.out_bias, x1, scales[0]
    )
    norm = w.norm2, w.norm2_bias, eps[1]
    fc1, fc2 = (products.fc1, products.fc1_bias), (products.fc2, products.fc2_bias)
    if narrow:
        x3 = conv(x2, w.cpe2, w.cpe2_bias, residual=True)
        out, hidden = mlp(x3, *norm, *fc1, *fc2, scales[1], keep)
    else:
        x3, u = conv_and_norm(x2, w.cpe2, w.cpe2_bias, *norm, dtype, merged)
        activated, hidden = linear_gelu(u.view(-1, channels), *fc1, keep)
        out = linear_residual(activated, *fc2, x3, scales[1])
    kept = (x, x1, projected, v, qk, y, states, x2, x3, hidden)
    return out, kept if keep else (), products


def conv_and_norm(
    x: Tensor,
    taps: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    merged: bool,
) -> Tuple[Tensor, Tensor]:
    """x + conv(x), and its LayerNorm in the given dtype."""
    if merged and x.shape[-1] <= MAX_NORM_CHANNELS:
        return conv_norm(x, taps, bias, norm_weight, norm_bias, eps, dtype)
    x = conv(x, taps, bias, residual=True)
    return x, layer_norm(x, norm_weight, norm_bias, eps, dtype)


def backward(
    grad: Tensor,
    kept: Sequence[Tensor],
    num_heads: int,
    eps: Tuple[float, float],
    scales: Sequence[Optional[Tensor]],
    w: Weights,
    products: _Products,
) -> Tuple[Tensor, List[Optional[Tensor]]]:
    """Gradients of the input, and of the parameters in their order."""
    x, x1, projected, v, qk, y, states, x2, x3, hidden = kept
    dtype, channels = projected.dtype, x.shape[-1]
    inner, gate = projected.split(channels, dim=-1)
    grad = grad.contiguous()

    # x3 + s fc2(GELU(fc1(LN(x3))))
    rows = grad.view(-1, channels).to(dtype)
    grad_hidden, activated, fc1_sums = gelu_linear_grad(
        rows, products.fc2, hidden, scales[1]
    )
    fc2 = weight_grad(rows, activated, w.fc2)
    del activated
    grad_u = (grad_hidden @ products.fc1).view(x3.shape)
    grad, norm2_sums, u = layer_norm_residual_grad(
        x3, w.norm2, w.norm2_bias, eps[1], grad_u, grad, scales[1]
    )
    fc1 = weight_grad(grad_hidden, u.view(-1, channels), w.fc1)
    del grad_hidden, grad_u, u
    grad, cpe2_sums = conv_grad(x2, w.cpe2, grad, residual=True)

    # x1 + s out_proj(gated)
    rows = grad.view(-1, channels).to(dtype)
    grad_gated = (rows @ products.out).view(v.shape)
    grad_projected = torch.empty_like(projected)
    grad_inner, grad_gate = grad_projected.split(channels, dim=-1)
    grad_y, gated = gated_conv_grad(
        v, w.lepe, w.lepe_bias, y, gate, grad_gated, grad_gate, scales[0]
    )
    out = weight_grad(rows, gated.view(-1, channels), w.out_proj)
    grad_qk, grad_v = linear_attention_grad(qk, v, y, states, grad_y, num_heads)
    rows = grad_qk.view(-1, 2 * channels)
    qk = weight_grad(rows, v.view(-1, channels), w.qk)
    qk_sums = None if w.qk_bias is None else column_sums(rows)
    grad_v.view(-1, channels).addmm_(rows, products.qk)
    del grad_qk, gated, grad_gated
    grad_v, lepe_sums = conv_grad(v, w.lepe, grad_y, added=grad_v)
    grad_v = silu_conv_grad(inner, w.dwc, w.dwc_bias, grad_v)
    _, dwc_sums = conv_grad(inner, w.dwc, grad_v, out=grad_inner)

    # in_proj(LN(x1)), act_proj(LN(x1)), x1 = x + conv(x)
    rows = grad_projected.view(-1, 2 * channels)
    in_act_sums = column_sums(rows)
    grad_u = (rows @ products.in_act).view(x1.shape)
    grad, norm1_sums, u = layer_norm_residual_grad(
        x1, w.norm1, w.norm1_bias, eps[0], grad_u, grad, scales[0]
    )
    in_proj, act_proj = weight_grad(rows, u.view(-1, channels), w.in_proj).chunk(2)
    grad, cpe1_sums = conv_grad(x, w.cpe1, grad, residual=True)

    maps = [
        (cpe1_sums, ['cpe1', 'cpe1_bias']),
        (norm1_sums, ['norm1', 'norm1_bias', 'out_proj_bias']),
        (in_act_sums, ['in_proj_bias', 'act_proj_bias']),
        (dwc_sums, ['dwc', 'dwc_bias']),
        (lepe_sums, ['lepe', 'lepe_bias']),
        (cpe2_sums, ['cpe2', 'cpe2_bias']),
        (norm2_sums, ['norm2', 'norm2_bias', 'fc2_bias']),
        (fc1_sums, ['fc1_bias']),
    ]
    if qk_sums is not None:
        maps.append((qk_sums, ['qk_bias']))
    totals = add_up(
        *((sums, [getattr(w, name) for name in names]) for sums, names in maps)
    )
    grads = dict(
        zip((name for _, names in maps for name in names), totals),
        in_proj=in_proj,
        act_proj=act_proj,
        qk=qk,
        out_proj=out,
        fc1=fc1,
        fc2=fc2,
    )
    return grad, [grads.get(name) for name in Weights._fields]


def _cast(w: Weights, dtype: torch.dtype) -> _Products:
    """Cast the parameters of the products to their dtype, all in one kernel."""
    channels = len(w.in_proj)
    wanted = [
        w.in_proj,
        w.act_proj,
        w.in_proj_bias,
        w.act_proj_bias,
        w.qk,
        w.out_proj,
        w.out_proj_bias,
        w.fc1,
        w.fc1_bias,
        w.fc2,
        w.fc2_bias,
    ]
    if w.qk_bias is not None:
        wanted.append(w.qk_bias)
    parts = casts.parts(wanted, dtype)
    if not (
        parts
        and casts.are_neighbours(parts[0], parts[1])
        and casts.are_neighbours(parts[2], parts[3])
    ):
        parts = casts.make(wanted, dtype)
    # Two layers lie next to each other in memory, and so form one with both outputs.
    in_act = parts[0].as_strided((2 * channels, channels), (channels, 1))
    in_act_bias = parts[2].as_strided((2 * channels,), (1,))
    qk_bias = None if w.qk_bias is None else parts[11]
    return _Products(in_act, in_act_bias, parts[4], qk_bias, *parts[5:11])
