# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The definitions of the ops, in plain PyTorch. Every faster version must equal them.

They run on every device, in any floating-point type. In graphs, and with
``MLLA_OPS=naive``, models call their layers, which compute the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat.pytorch import without_autocast
from .rotary import rotary_embedding

#: Types whose range or precision is not enough for some steps.
HALF = (torch.float16, torch.bfloat16)
#: The number that is added to the normaliser of the attention.
EPS = 1e-6


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool = False, act: bool = False
) -> Tensor:
    """3x3 depthwise convolution with zero padding 1 on a channels-last map.

    ::

        y = [x +] [SiLU](conv(x, weight) + bias)

    Args:
        x (Tensor): Feature map (N, H, W, C).
        weight (Tensor): (C, 1, 3, 3).
        bias (Tensor): (C,).
        residual (bool): Whether to add the input. Defaults to False.
        act (bool): Whether SiLU follows the convolution. Defaults to False.

    Returns:
        Tensor: (N, H, W, C).
    """
    # PyTorch sees the permuted view as a channels-last tensor and copies nothing.
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    y = y.permute(0, 2, 3, 1)
    if act:
        y = F.silu(y)
    return x + y if residual else y


def mlla_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """Gated linear attention with local position encoding, the core of an MLLA block.

    ::

        y = (LinearAttention(q, k, v) + LePE(v)) * SiLU(gate)

    LePE is a 3x3 depthwise convolution. See :func:`linear_attention`.

    Args:
        qk (Tensor): Queries, then keys, before the feature map, (N, H, W, 2C).
        v (Tensor): Values, (N, H, W, C).
        gate (Tensor): Gate before SiLU, (N, H, W, C).
        weight (Tensor): Weight of LePE, (C, 1, 3, 3).
        bias (Tensor): Bias of LePE, (C,).
        num_heads (int): Number of heads, a divisor of C.

    Returns:
        Tensor: (N, H, W, C), the dtype of ``v``.
    """
    q, k = qk.chunk(2, dim=-1)
    y = linear_attention(q, k, v, num_heads) + depthwise_conv(v, weight, bias)
    return y * F.silu(gate)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head linear attention over all tokens of a feature map.

    Let q and k be the queries and keys after the feature map ELU + 1, q~ and k~ their
    rotations, and n = H * W the number of tokens. Then, for each head::

        y = q~ (k~^T v / n) / (q . mean_n(k) + 1e-6)

    The normaliser uses q and k before the rotation. Feature map, rotation and
    normaliser are computed in float32 (or float64), because q . mean_n(k) underflows in
    half precision. The two matrix products run in :func:`product_dtype` of ``v``. Time
    and memory are linear in n (Sec. 3 of arXiv 2405.16605).

    Args:
        q (Tensor): Queries before the feature map, (N, H, W, C).
        k (Tensor): Keys before the feature map, (N, H, W, C).
        v (Tensor): Values, (N, H, W, C).
        num_heads (int): Number of heads, a divisor of C.

    Returns:
        Tensor: (N, H, W, C), the dtype of ``v``.
    """
    q = F.elu(at_least_float32(q)) + 1
    k = F.elu(at_least_float32(k)) + 1
    q_rotated, k_rotated = rotary_embedding(q), rotary_embedding(k)
    y = mean_over_tokens(q_rotated, k_rotated, v, num_heads)
    return (y / normaliser(q, k, num_heads)).flatten(-2).to(v.dtype)


def mean_over_tokens(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Linear attention without its normaliser: y = q (k^T v / n), for each head.

    Args:
        q (Tensor): Queries after the feature map, (N, H, W, heads * d), float32 or
            float64.
        k (Tensor): Keys after the feature map, of the same shape and type.
        v (Tensor): Values, (N, H, W, C).
        num_heads (int): Number of heads.

    Returns:
        Tensor: (N, H, W, heads, C / heads), float32 or float64.
    """
    height, width = v.shape[1:3]
    dtype = product_dtype(v)
    # Each factor is multiplied by the root of 1 / n, so that the sum stays in range. A
    # traced program runs it in half precision if autocast is on where it runs.
    scale = (height * width) ** -0.5
    queries = _split_heads(q.to(dtype), num_heads)
    keys = _split_heads((k * scale).to(dtype), num_heads)
    values = _split_heads(v.to(dtype) * scale, num_heads)
    # Autocast would run the products in half precision.
    with without_autocast(v.device.type):
        y = queries @ (keys.transpose(-2, -1) @ values)
    return at_least_float32(y).transpose(1, 2).unflatten(1, (height, width))


def normaliser(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """The sum of the attention's weights: q . mean_n(k) + 1e-6, for each head.

    Args:
        q (Tensor): Queries after the feature map, (N, H, W, heads * d), float32 or
            float64.
        k (Tensor): Keys after the feature map, of the same shape and type.
        num_heads (int): Number of heads.

    Returns:
        Tensor: (N, H, W, heads, 1).
    """
    products = q * k.mean(dim=(1, 2), keepdim=True)
    return products.unflatten(-1, (num_heads, -1)).sum(dim=-1, keepdim=True) + EPS


def product_dtype(v: Tensor) -> torch.dtype:
    """The dtype of the attention's matrix products: that of the values, or float32.

    It is float32 for float16. Sums over the tokens, and gradients that are divided by
    the normaliser, can be out of float16's range.

    Args:
        v (Tensor): Values.
    """
    return torch.float32 if v.dtype == torch.float16 else v.dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32. Other types stay as they are."""
    return x.float() if x.dtype in HALF else x


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, H, W, C) -> (N, heads, H * W, C / heads)."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the channels.

    Args:
        x (Tensor): (..., C).
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance.

    Returns:
        Tensor: (..., C). Under autocast on CUDA it is float32.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(x W^T + b).

    Args:
        x (Tensor): (..., C).
        weight (Tensor): (D, C).
        bias (Tensor): (D,).

    Returns:
        Tensor: (..., D).
    """
    return F.relu(F.linear(x, weight, bias), inplace=True)


def expand_and_halve(
    x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor
) -> Tensor:
    """The wide part of patch merging.

    ::

        h = ReLU(x W^T + b)         y = ReLU(conv(h) + c)

    conv is a 3x3 depthwise convolution with stride 2 and padding 1.

    Args:
        x (Tensor): (N, 2H, 2W, C).
        weight (Tensor): W, (D, C).
        bias (Tensor): b, (D,).
        taps (Tensor): Weight of the convolution, (D, 1, 3, 3).
        conv_bias (Tensor): c, (D,).

    Returns:
        Tensor: (N, H, W, D).
    """
    h = linear_relu(x, weight, bias).permute(0, 3, 1, 2)
    y = F.conv2d(h, taps, conv_bias, stride=2, padding=1, groups=len(taps))
    return F.relu(y, inplace=True).permute(0, 2, 3, 1)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: bool,
) -> Tensor:
    """BatchNorm by running statistics, followed by ReLU if ``act`` is True.

    Args:
        x (Tensor): (N, C, H, W).
        mean (Tensor): Running mean, (C,).
        var (Tensor): Running variance, (C,).
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance.
        act (bool): Whether ReLU follows.

    Returns:
        Tensor: (N, C, H, W).
    """
    y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
    return F.relu(y, inplace=True) if act else y


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """Linear layer, GELU (by the error function), linear layer.

    Args:
        x (Tensor): (..., C).
        weight1 (Tensor): (hidden, C).
        bias1 (Tensor): (hidden,).
        weight2 (Tensor): (C, hidden).
        bias2 (Tensor): (C,).

    Returns:
        Tensor: (..., C).
    """
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
