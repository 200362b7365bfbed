# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Attentions of other papers as token mixers: Q, K and V are as the baseline's.

FLatten's Table 3(b) has four of them in a Swin-T of 29 M parameters (Hydra 80.7,
Efficient 81.0, Enhanced 81.8 and FLatten 82.1 % top-1 accuracy on ImageNet-1K), and
arXiv 2405.16605 repeats three in its Table 6. There, they are in the first two stages
only, beside softmax attention in windows in the others. These figures do not compare
with the baseline's 77.6 %, whose attention is linear in all four stages.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ... import ops
from ...arch import check_int
from ...ops.naive import at_least_float32, mean_over_tokens, normaliser
from .token_mixer import TokenMixer


@MODELS.register_module()
class SoftmaxAttention(TokenMixer):
    """Softmax attention over all tokens, as in ViT (arXiv 1706.03762, Eq. 1).

    For each head of d channels::

        y = softmax(Q K^T / sqrt(d)) V

    Time is quadratic in the number of tokens. Memory is linear where PyTorch's
    ``scaled_dot_product_attention`` has a kernel that keeps no weights. Swin's windows
    and its table of relative positions are left out: the other mixers have neither.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes C / num_heads. Defaults to None.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, values = (
            x.to(v.dtype)
            .flatten(1, 2)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)
            for x in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, values)
        return y.transpose(1, 2).flatten(-2).unflatten(1, v.shape[1:3])


@MODELS.register_module()
class EfficientAttention(TokenMixer):
    """Efficient attention (arXiv 1812.01243) with its softmax normalisation.

    For each head::

        y = softmax(Q) (softmax(K)^T V)

    The softmax of queries is over the channels of the head, that of keys over the
    tokens. The paper's residual and output projection are the block's.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes C / num_heads. Defaults to None.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = v.shape[1:3]
        q = at_least_float32(q).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        k = at_least_float32(k).flatten(1, 2).softmax(1).unflatten(1, (height, width))
        # The sum over the tokens is n times their mean.
        y = mean_over_tokens(q.flatten(-2), k * (height * width), v, self.num_heads)
        return y.flatten(-2).to(v.dtype)


@MODELS.register_module()
class HydraAttention(TokenMixer):
    """Hydra attention (arXiv 2209.07484): as many heads as channels, a cosine kernel.

    With o the elementwise product, for each token i::

        y_i = Q_i / |Q_i| o sum_j(K_j / |K_j| o V_j)

    The norms are over all channels. The sum is not divided by anything, so it grows
    with the number of tokens.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): What blocks give. It is not read.
        v_proj (bool): Whether values are projected. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        v_proj: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(embed_dims, embed_dims, v_proj, qkv_bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, values = (at_least_float32(x) for x in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return (q * (k * values).sum((1, 2), keepdim=True)).to(v.dtype)


@MODELS.register_module()
class EnhancedLinearAttention(TokenMixer):
    """ReLU linear attention and a depthwise convolution: EfficientViT's first version.

    For each head, with phi = ReLU (Eq. 3 of arXiv 2205.14756 in its last version)::

        y_i = phi(Q_i) sum_j(phi(K_j)^T V_j) / (phi(Q_i) sum_j(phi(K_j)^T)) + DWC(V)_i

    The paper's depthwise convolution is in the middle of the MLP that follows, and the
    MLP is no part of a mixer. Here DWC is a 3x3 convolution of the values beside the
    attention, for the same end: what is local. The aggregation at several scales of the
    paper's later versions is left out.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes C / num_heads. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        v_proj: bool = True,
        qkv_bias: bool = True,
        qk_head_dims: Optional[int] = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, v_proj, qkv_bias, qk_head_dims)
        self.dwc = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = _linear_attention(F.relu(q), F.relu(k), v, self.num_heads)
        return y + ops.depthwise_conv(v, self.dwc)


@MODELS.register_module()
class FocusedLinearAttention(TokenMixer):
    """FLatten's focused linear attention (arXiv 2308.00442, Eqs. 5, 6 and 12).

    With x**p the elementwise power, for each head::

        f(x) = |x| / |x**p| x**p                              focuses, and keeps |x|
        phi(x) = f((ReLU(x) + 1e-6) / softplus(s))
        y_i = phi(Q_i) sum_j(phi(K_j)^T V_j) / (phi(Q_i) sum_j(phi(K_j)^T)) + DWC(V)_i

    As in the authors' code, the norms are over the channels of all heads, a parameter s
    scales each channel, and DWC is a 5x5 depthwise convolution with the same weights
    for all heads. Their table of positions, which is added to K, is left out: it is
    tied to one image size.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes C / num_heads. Defaults to None.
        power (int): p, at least 1. Defaults to 3.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        v_proj: bool = True,
        qkv_bias: bool = True,
        qk_head_dims: Optional[int] = None,
        power: int = 3,
    ) -> None:
        super().__init__(embed_dims, num_heads, v_proj, qkv_bias, qk_head_dims)
        check_int('power', power, 1)
        self.power = power
        self.scale = nn.Parameter(torch.zeros(num_heads * self.qk_head_dims))
        channels = embed_dims // num_heads
        self.dwc = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = _linear_attention(self._focus(q), self._focus(k), v, self.num_heads)
        # (N, H, W, C) -> (N * heads, C / heads, H, W)
        heads = v.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)
        local = self.dwc(heads.flatten(0, 1)).unflatten(0, (-1, self.num_heads))
        return y + local.flatten(1, 2).permute(0, 2, 3, 1)

    def _focus(self, x: Tensor) -> Tensor:
        """phi."""
        x = (F.relu(at_least_float32(x)) + 1e-6) / F.softplus(self.scale)
        # Of any factor, f(x) has the same. This one keeps the power in range.
        power = (x / x.detach().amax(-1, keepdim=True)) ** self.power
        return F.normalize(power, dim=-1) * x.norm(dim=-1, keepdim=True)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Linear attention of queries and keys after their feature map, (N, H, W, C)."""
    q, k = at_least_float32(q), at_least_float32(k)
    y = mean_over_tokens(q, k, v, num_heads) / normaliser(q, k, num_heads)
    return y.flatten(-2).to(v.dtype)
