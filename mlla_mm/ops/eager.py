# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops from PyTorch's own kernels, in few passes over memory.

Signatures and results are the same as in :mod:`mlla_mm.ops.naive`.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat.pytorch import is_autocast, linear_dtype, without_autocast
from . import naive
from .rotary import rotation

_elu_backward = torch.ops.aten.elu_backward
_silu_backward = torch.ops.aten.silu_backward


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""
    if residual and not act and _in_full_precision(x):
        # x + conv(x) is a single convolution with 1 added to the middle weight.
        identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return naive.depthwise_conv(x, weight + identity, bias)
    y = naive.depthwise_conv(x, weight, bias)
    if act:
        y = F.silu(y, inplace=not y.requires_grad)
    return x + y if residual else y


def _in_full_precision(x: Tensor) -> bool:
    """Whether x is multiplied in its own dtype. Half precision rounds 1 + weight."""
    return x.dtype not in naive.HALF and not is_autocast(x.device.type)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""
    lepe = depthwise_conv(v, weight, bias)
    if torch.is_grad_enabled():
        return _GatedAttention.apply(qk, v, lepe, gate, num_heads)
    with without_autocast(v.device.type):
        features = _features(qk)
        y, _ = _attend(features, v, lepe, num_heads, rotated=features)
        return y.mul_(F.silu(gate))


class _GatedAttention(torch.autograd.Function):
    """(LinearAttention(q, k, v) + lepe) * SiLU(gate), with an explicit gradient.

    The backward pass computes again what takes few passes over saved tensors. With the
    features q and k, their rotations q~ and k~, and n tokens::

        A = k~^T v / n      z = 1 / (q . mean(k) + eps)      y = z q~ A

    In half precision, features, rotations and z are in float32 between the steps. The
    kernels cast what they read and write. Products are in half precision, but in
    float32 for float16, see :func:`mlla_mm.ops.naive.product_dtype`.
    """

    @staticmethod
    def forward(
        ctx, qk: Tensor, v: Tensor, lepe: Tensor, gate: Tensor, num_heads: int
    ) -> Tensor:
        with without_autocast(v.device.type):
            features = _features(qk)
            # In half precision, qk takes less memory than its features.
            is_half = qk.dtype in naive.HALF
            rotated = features if is_half else torch.empty_like(features)
            y, kept = _attend(features, v, lepe, num_heads, rotated)
            out = (y * F.silu(gate)).to(v.dtype)
        ctx.save_for_backward(qk if is_half else features, v, y, gate, *kept)
        ctx.lepe_dtype = lepe.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        queries_keys, v, y, gate, key_mean, z, kv = ctx.saved_tensors
        is_half = queries_keys.dtype in naive.HALF
        dtype, num_heads = kv.dtype, z.shape[-1]
        with without_autocast(v.device.type):
            # In this order only the result itself can be out of float16's range.
            grad_gate = _silu_backward(y, gate).mul_(grad)
            grad = grad * F.silu(gate)  # of y

            features = _features(queries_keys) if is_half else queries_keys
            rotated = _rotate(features)
            q, k, values = (
                _heads(x, dtype, num_heads)
                for x in (*_queries_keys(rotated), v.flatten(1, 2))
            )
            of_heads = grad.reshape(z.shape + (-1,)).transpose(1, 2)
            grad_qkv = torch.empty_like(values)
            torch.mul(of_heads, z.transpose(1, 2)[..., None], out=grad_qkv)
            grad_q = grad_qkv @ kv.transpose(-2, -1)
            mean_grad_kv = _mean_of_products(q, grad_qkv)
            grad_v = _contiguous((k @ mean_grad_kv).transpose(1, 2), v.dtype)
            # The gradient through z: for each token and head, grad . y is grad_q . q~.
            grad_norm = (grad_q * q).sum(-1, dtype=z.dtype).transpose(1, 2)
            grad_norm = grad_norm.mul(z).neg_()

            grad_rotated = rotated  # reuses the memory
            for part, x in zip(
                _queries_keys(grad_rotated),
                (grad_q, values @ mean_grad_kv.transpose(-2, -1)),
            ):
                part.unflatten(-1, (num_heads, -1)).copy_(x.transpose(1, 2))
            grad_features = _rotate(grad_rotated, back=True, out=grad_rotated)
            grad_q, grad_k = _queries_keys(grad_features)
            q, _ = _queries_keys(features)
            grad_q.baddbmm_(grad_norm, key_mean.transpose(-2, -1))
            grad_mean = _diagonal_blocks(grad_norm.transpose(-2, -1) @ q)
            grad_k += grad_mean[:, None] / q.shape[1]
            # The derivative of ELU + 1 is ELU + 1 where that is below 1, and else 1.
            if is_half:
                grad_qk = torch.empty_like(features, dtype=queries_keys.dtype)
                _elu_backward.grad_input(
                    grad_features, 1, 1, 1, False, queries_keys, grad_input=grad_qk
                )
            else:
                grad_qk = grad_features.mul_(features.clamp_max(1))
        return (
            grad_qk,
            grad_v.view(v.shape),
            grad.to(ctx.lepe_dtype),
            grad_gate.to(gate.dtype),
            None,
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`mlla_mm.ops.naive.layer_norm` in the dtype of x, also under autocast.

    PyTorch's kernels compute in float32 whatever they read and write. On CUDA all their
    tensors have one dtype.
    """
    with without_autocast(x.device.type):
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlp`."""
    if torch.is_grad_enabled():
        tensors = _as_linear_sees(x.flatten(0, -2), weight1, bias1, weight2, bias2)
        return _MLP.apply(*tensors).view(*x.shape[:-1], len(bias2))
    hidden = torch.ops.aten.gelu_(F.linear(x, weight1, bias1))
    return F.linear(hidden, weight2, bias2)


class _MLP(torch.autograd.Function):
    """Two linear layers with GELU between. The backward pass computes GELU again."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(x, weight1, bias1)
            out = F.linear(F.gelu(hidden), weight2, bias2)
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_weight2 = grad.t() @ F.gelu(hidden)
            grad_hidden = torch.ops.aten.gelu_backward(grad @ weight2, hidden)
            grad_weight1 = grad_hidden.t() @ x
            grad_x = grad_hidden @ weight1
        return grad_x, grad_weight1, grad_hidden.sum(0), grad_weight2, grad.sum(0)


def _as_linear_sees(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Cast tensors as autocast does for a linear layer."""
    return tuple(x.to(linear_dtype(x)) for x in tensors)


def _features(x: Tensor) -> Tensor:
    """ELU(x) + 1 = e^min(x, 0) + max(x, 0), in float32 or float64, contiguous."""
    x = x.contiguous()
    dtype = torch.promote_types(x.dtype, torch.float32)
    # The derivative of ELU is e^min(x, 0). The gradient 1 makes the kernel compute in
    # its dtype, without a pass that casts x. ELU itself, in half precision, would lose
    # small features to rounding.
    one = torch.ones(1, dtype=dtype, device=x.device)
    return _elu_backward(one, 1, 1, 1, False, x).add_(x.relu())


def _queries_keys(x: Tensor) -> Tuple[Tensor, ...]:
    """The two halves of a map (N, H, W, 2C) as views, each (N, H * W, C)."""
    return x.flatten(1, 2).chunk(2, dim=-1)


def _rotate(x: Tensor, back: bool = False, out: Optional[Tensor] = None) -> Tensor:
    """Rotate queries and keys (N, H, W, 2C) by position. ``out`` may be ``x``."""
    table = rotation(x)[:, :, None]
    out = torch.empty_like(x) if out is None else out
    pairs, out_pairs = (
        torch.view_as_complex(y.unflatten(-1, (2, -1, 2))) for y in (x, out)
    )
    torch.mul(pairs, table.conj() if back else table, out=out_pairs)
    return out


def _normaliser(features: Tensor, num_heads: int) -> Tuple[Tensor, Tensor]:
    """z = 1 / (q . mean(k) + eps), (N, n, heads), and mean(k) in diagonal blocks."""
    q, k = _queries_keys(features)
    key_mean = _block_diagonal(k.mean(dim=1), num_heads)
    return (q @ key_mean).add_(naive.EPS).reciprocal_(), key_mean


def _attend(
    features: Tensor, v: Tensor, lepe: Tensor, num_heads: int, rotated: Tensor
) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor]]:
    """The attention plus ``lepe``, whose memory it may overwrite.

    ``rotated`` is memory for the rotated features, and may be the features themselves.

    Returns:
        tuple: The sum (N, H, W, C), in the dtype of ``v``, and what the backward pass
        needs: mean(k) in diagonal blocks, z, and k~^T v / n for each head.
    """
    z, key_mean = _normaliser(features, num_heads)
    dtype = naive.product_dtype(v)
    rotated = _rotate(features, out=rotated)
    q, k = (_heads(x, dtype, num_heads) for x in _queries_keys(rotated))
    kv = _mean_of_products(k, _heads(v.flatten(1, 2), dtype, num_heads))
    y = (q @ kv).transpose(1, 2)
    out = _contiguous(lepe, v.dtype)
    out.view(y.shape).addcmul_(y, z[..., None])
    return out, (key_mean, z, kv)


def _heads(x: Tensor, dtype: torch.dtype, num_heads: int) -> Tensor:
    """(N, n, C) -> (N, heads, n, C / heads), contiguous."""
    return _contiguous(x.unflatten(-1, (num_heads, -1)).transpose(1, 2), dtype)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x and lay it out anew, in at most one kernel."""
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _mean_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b / n for matrices with n rows."""
    return (a.transpose(-2, -1) @ b).div_(a.shape[-2])


def _block_diagonal(x: Tensor, num_heads: int) -> Tensor:
    """(N, C) -> (N, C, heads): for each head, zeros in the channels of other heads.

    So the products of all heads become one matrix product.
    """
    x = x.unflatten(-1, (num_heads, -1))
    blocks = x.new_zeros(*x.shape, num_heads)
    blocks.diagonal(dim1=1, dim2=3).copy_(x.transpose(1, 2))
    return blocks.flatten(1, 2)


def _diagonal_blocks(x: Tensor) -> Tensor:
    """(N, heads, C) -> (N, C): for each channel, take the row of its head."""
    blocks = x.unflatten(-1, (x.shape[1], -1))
    return blocks.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)
