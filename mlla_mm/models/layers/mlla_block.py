# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import List, Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.drop import DropPath
from torch import Tensor, nn

from ...ops import fused_block, is_fused, linear_attention, mlla_attention, mlp
from .conv import DepthwiseConv2d
from .layer_norm import LayerNorm
from .unmodified import is_unmodified


class LinearAttention(nn.Module):
    """Gated linear attention with rotary and local position encoding.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        qkv_bias (bool): Whether the query-key projection has a bias.
            Defaults to True.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(embed_dims, embed_dims * 2, bias=qkv_bias)
        self.lepe = DepthwiseConv2d(embed_dims)

    def forward(self, v: Tensor, gate: Tensor) -> Tensor:
        """Values and gate before its SiLU, (N, H, W, C) each -> (N, H, W, C)."""
        qk, lepe = self.qk(v), self.lepe
        if is_unmodified(DepthwiseConv2d, lepe):
            return mlla_attention(qk, v, gate, lepe.weight, lepe.bias, self.num_heads)
        y = linear_attention(*qk.chunk(2, dim=-1), v, self.num_heads)
        return (y + lepe(v)) * F.silu(gate)


class MLP(nn.Module):
    """Linear, GELU (erf), dropout, linear, dropout."""

    def __init__(self, embed_dims: int, hidden_dims: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2, drop = self.fc1, self.fc2, self.drop
        if (
            not is_unmodified(nn.Linear, fc1, fc2)
            or not is_unmodified(nn.Dropout, drop)
            or (drop.p and self.training)
            or fc1.bias is None
            or fc2.bias is None
        ):
            return drop(fc2(drop(F.gelu(fc1(x)))))
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class MLLABlock(nn.Module):
    """Mamba-like linear attention block, Fig. 3 of arXiv 2405.16605.

    ::

        x = x + CPE1(x)
        u = LN(x)
        x = x + DropPath(out_proj(Attn(SiLU(DWC(in_proj(u)))) * SiLU(act_proj(u))))
        x = x + CPE2(x)
        x = x + DropPath(MLP(LN(x)))

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of attention heads, a divisor of C.
        mlp_ratio (float): Hidden channels of the MLP over C. Defaults to 4.
        qkv_bias (bool): Whether the query-key projection has a bias.
            Defaults to True.
        drop_rate (float): Dropout in the MLP. Defaults to 0.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.cpe1 = DepthwiseConv2d(embed_dims, residual=True)
        self.norm1 = LayerNorm(embed_dims)
        self.in_proj = nn.Linear(embed_dims, embed_dims)
        self.act_proj = nn.Linear(embed_dims, embed_dims)
        self.dwc = DepthwiseConv2d(embed_dims, act=True)
        self.attn = LinearAttention(embed_dims, num_heads, qkv_bias)
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        self.drop_path = DropPath(drop_path_rate)
        self.cpe2 = DepthwiseConv2d(embed_dims, residual=True)
        self.norm2 = LayerNorm(embed_dims)
        self.mlp = MLP(embed_dims, int(embed_dims * mlp_ratio), drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        parameters = self._parameters_to_fuse() if is_fused(x) else None
        block = parameters and fused_block(x, parameters, self.attn.num_heads)
        if block:
            eps = self.norm1.eps, self.norm2.eps
            scales = self._draw_scale(x), self._draw_scale(x)
            return block(x, parameters, self.attn.num_heads, eps, scales)
        x = self.cpe1(x)
        x = x + self.drop_path(self._attend(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        v = self.dwc(self.in_proj(x))
        return self.out_proj(self.attn(v, gate=self.act_proj(x)))

    def _parameters_to_fuse(self) -> Optional[List[Optional[Tensor]]]:
        """Weight and bias of each layer, in order, if nothing else is at work."""
        attn, mlp = self.attn, self.mlp
        if (
            not is_unmodified(DepthwiseConv2d, self.cpe1, self.dwc, self.cpe2)
            or not is_unmodified(LayerNorm, self.norm1, self.norm2)
            or not is_unmodified(nn.Linear, self.in_proj, self.act_proj, self.out_proj)
            or not is_unmodified(DropPath, self.drop_path)
            or not is_unmodified(LinearAttention, attn)
            or not is_unmodified(nn.Linear, attn.qk)
            or not is_unmodified(DepthwiseConv2d, attn.lepe)
            or not is_unmodified(MLP, mlp)
            or not is_unmodified(nn.Linear, mlp.fc1, mlp.fc2)
            or not is_unmodified(nn.Dropout, mlp.drop)
            or (mlp.drop.p and self.training)
        ):
            return None
        layers = (
            self.cpe1,
            self.norm1,
            self.in_proj,
            self.act_proj,
            self.dwc,
            attn.qk,
            attn.lepe,
            self.out_proj,
            self.cpe2,
            self.norm2,
            mlp.fc1,
            mlp.fc2,
        )
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def _draw_scale(self, x: Tensor) -> Optional[Tensor]:
        """What stochastic depth multiplies the images by, (N,); None for 1."""
        rate = self.drop_path.drop_prob
        if not rate or not self.training:
            return None
        kept = x.new_empty(len(x), dtype=torch.float32).bernoulli_(1 - rate)
        return kept.div_(1 - rate)
