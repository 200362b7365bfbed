# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The ops in few passes over memory, from PyTorch's own kernels.

Signatures and results are those of :mod:`mlla_mm.ops.naive`.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils.compat import autocast_dtype, is_autocast
from . import naive
from .rotary import rotation

_HALF = (torch.float16, torch.bfloat16)
# Numbers of a part of a map that is computed part by part on the CPU: 4 MiB of float32.
_CACHED = 1 << 20


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.depthwise_conv`."""
    if residual and not act and _in_full_precision(x):
        # x + conv(x) is one convolution, whose middle weight is greater by one.
        identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return naive.depthwise_conv(x, weight + identity, bias)
    y = naive.depthwise_conv(x, weight, bias)
    if act:
        y = F.silu(y, inplace=not y.requires_grad)
    return x + y if residual else y


def _in_full_precision(x: Tensor) -> bool:
    """Whether x is multiplied as it is; half precision would round 1 + weight."""
    return x.dtype not in _HALF and not is_autocast(x.device.type)


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlla_attention`."""
    lepe = depthwise_conv(v, weight, bias)
    return _GatedAttention.apply(qk, v, lepe, gate, num_heads)


class _GatedAttention(torch.autograd.Function):
    """(LinearAttention(q, k, v) + lepe) * SiLU(gate), with the gradient written out.

    The backward pass keeps the inputs and what is small; it computes the features and
    rotates them again. With the features q, k, rotated q~, k~, and n tokens::

        A = k~^T v / n      z = 1 / (q . mean(k) + eps)      y = z q~ A
    """

    @staticmethod
    def forward(
        ctx, qk: Tensor, v: Tensor, lepe: Tensor, gate: Tensor, num_heads: int
    ) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            features = _features(qk)
            q, k = _queries_keys(features)
            key_mean = _block_diagonal(k.mean(dim=1), num_heads)
            z = (q @ key_mean).add_(naive.EPS).reciprocal_()
            _rotate_(features)  # q and k are parts of it
            q, k = (_heads(x, v.dtype, num_heads) for x in (q, k))
            kv = _mean_of_products(k, _heads(v.flatten(1, 2), v.dtype, num_heads))
            y = _normalised(q @ kv, z).reshape(v.shape)
            out = (y.add_(lepe) * F.silu(naive.at_least_float32(gate))).to(v.dtype)
        ctx.save_for_backward(qk, v, lepe, gate, key_mean, z, kv)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        qk, v, lepe, gate, key_mean, z, kv = ctx.saved_tensors
        num_heads = z.shape[-1]
        with torch.autocast(v.device.type, enabled=False):
            features = _features(qk)
            rotated = _rotate_(features.clone())
            q, k, values = (
                _heads(x, v.dtype, num_heads)
                for x in (*_queries_keys(rotated), v.flatten(1, 2))
            )
            y = _normalised(q @ kv, z).reshape(v.shape)
            grad, gate32 = naive.at_least_float32(grad), naive.at_least_float32(gate)
            grad_gate = torch.ops.aten.silu_backward(grad * (y + lepe), gate32)
            grad = grad * F.silu(gate32)  # of y and of lepe

            per_head = z.shape + (-1,)
            grad_norm = (grad * y).view(per_head).sum(-1).mul_(z).neg_()
            grad_qkv = _heads(
                (grad.view(per_head) * z[..., None]).flatten(2), v.dtype, num_heads
            )
            mean_grad_kv = _mean_of_products(q, grad_qkv)
            grad_v = _merge(k @ mean_grad_kv)
            grad_features = rotated
            grad_q, grad_k = _queries_keys(grad_features)
            grad_q.copy_(_merge(grad_qkv @ kv.transpose(-2, -1)))
            grad_k.copy_(_merge(values @ mean_grad_kv.transpose(-2, -1)))
            _rotate_(grad_features, back=True)
            q, k = _queries_keys(features)
            grad_q += grad_norm @ key_mean.transpose(-2, -1)
            grad_mean = _diagonal_blocks(q.transpose(-2, -1) @ grad_norm)
            grad_k += grad_mean[:, None] / k.shape[1]
            # The derivative of ELU + 1 is itself where it is below one.
            grad_qk = grad_features.mul_(features.clamp_max_(1))
        return (
            grad_qk.to(qk.dtype),
            grad_v.view(v.shape),
            grad.to(lepe.dtype),
            grad_gate.to(gate.dtype),
            None,
        )


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """See :func:`mlla_mm.ops.naive.mlp`."""
    parameters = (weight1, bias1, weight2, bias2)
    if torch.is_grad_enabled():
        return _MLP.apply(*_as_linear_sees(x, *parameters))
    tokens = x.flatten(0, -2)
    # A part of the hidden map stays in a CPU's cache, and its memory is used again.
    parts = 1 if x.is_cuda else -(-len(tokens) * len(weight1) // _CACHED)
    out = [naive.mlp(part, *parameters) for part in tokens.chunk(parts)]
    return torch.cat(out).view(x.shape)


class _MLP(torch.autograd.Function):
    """Two linear layers with GELU between, whose output is computed again."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(x, weight1, bias1)
            ctx.save_for_backward(x, hidden, weight1, weight2)
            return F.linear(F.gelu(hidden), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad, hidden = grad.flatten(0, -2), hidden.flatten(0, -2)
            grad_hidden = grad @ weight2
            grad_weight2 = grad.t() @ F.gelu(hidden)
            grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden)
            return (
                (grad_hidden @ weight1).view(x.shape),
                grad_hidden.t() @ x.flatten(0, -2),
                grad_hidden.sum(dim=0),
                grad_weight2,
                grad.sum(dim=0),
            )


def _as_linear_sees(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Tensors as autocast gives them to a linear layer."""
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)


def _features(x: Tensor) -> Tensor:
    """ELU(x) + 1, in float32 or float64."""
    x = naive.at_least_float32(x)
    # Its own kernel takes twice as long on the CPU. e^x is at least 1 + x.
    return torch.maximum(x + 1, x.exp().clamp_max_(1))


def _queries_keys(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Two parts of a map (N, H, W, 2C) as views, each (N, H * W, C)."""
    return x.flatten(1, 2).chunk(2, dim=-1)


def _rotate_(x: Tensor, back: bool = False) -> Tensor:
    """Rotate queries and keys (N, H, W, 2C) by position, in place."""
    table = rotation(x)[:, :, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (2, -1, 2)))
    pairs *= table.conj() if back else table
    return x


def _heads(x: Tensor, dtype: torch.dtype, num_heads: int) -> Tensor:
    """(N, n, C) -> (N, heads, n, C / heads), contiguous."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(dtype).contiguous()


def _merge(x: Tensor) -> Tensor:
    """(N, heads, n, C / heads) -> (N, n, C)."""
    return x.transpose(1, 2).flatten(2)


def _mean_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b / n for matrices of n rows."""
    if a.dtype in _HALF:
        # The sum over many tokens stays in range.
        scale = a.shape[-2] ** -0.5
        return (a * scale).transpose(-2, -1) @ (b * scale)
    return (a.transpose(-2, -1) @ b).div_(a.shape[-2])


def _normalised(y: Tensor, z: Tensor) -> Tensor:
    """(N, heads, n, C / heads) times z (N, n, heads) -> (N, n, heads, C / heads)."""
    return y.transpose(1, 2) * z[..., None]


def _block_diagonal(x: Tensor, num_heads: int) -> Tensor:
    """(N, C) -> (N, C, heads): a vector per head, zero in the other heads' channels.

    With it a product per head is one matrix product.
    """
    x = x.unflatten(-1, (num_heads, -1))
    blocks = x.new_zeros(*x.shape, num_heads)
    blocks.diagonal(dim1=1, dim2=3).copy_(x.transpose(1, 2))
    return blocks.flatten(1, 2)


def _diagonal_blocks(x: Tensor) -> Tensor:
    """The inverse of :func:`_block_diagonal`."""
    blocks = x.unflatten(1, (x.shape[-1], -1))
    return blocks.diagonal(dim1=1, dim2=3).transpose(1, 2).flatten(1)
