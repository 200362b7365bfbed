# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Layers of Swin, and Mamba's block, for the study of linear attention."""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ... import ops
from .drop_path import DropPath
from .linear_attention import LinearAttention
from .mlla_block import MLP
from .token_mixer import MLLAAttention, build_token_mixer


class PatchEmbed(nn.Module):
    """Swin's stem: a 4x4 convolution with stride 4, LayerNorm, dropout.

    Args:
        in_channels (int): Number of image channels.
        embed_dims (int): Number of output channels C.
        drop_rate (float): Dropout rate. Defaults to 0.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dims, 4, stride=4)
        self.norm = nn.LayerNorm(embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, C, ceil(H / 4), ceil(W / 4))."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.proj(ops.pad_to_multiple(x, 4)).permute(0, 2, 3, 1)
        return self.drop(ops.layer_norm(x, self.norm)).permute(0, 3, 1, 2)


class SwinPatchMerging(nn.Module):
    """Halve the resolution and double the channels by a linear layer, as Swin does.

    The channels of 2x2 tokens go through LayerNorm and a linear layer without bias.

    Args:
        in_channels (int): Number of input channels d. The output has 2d channels.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = nn.Linear(4 * in_channels, 2 * in_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d, H, W) -> (N, 2d, ceil(H / 2), ceil(W / 2))."""
        x = ops.pad_to_multiple(x, 2).permute(0, 2, 3, 1)
        # Swin's order: down first, then right.
        x = torch.cat([x[:, i::2, j::2] for j in range(2) for i in range(2)], dim=-1)
        return self.reduction(ops.layer_norm(x, self.norm)).permute(0, 3, 1, 2)


class _PreNormBlock(nn.Module):
    """A branch that mixes tokens, then an MLP, each with LayerNorm and a residual.

    ::

        x = x + CPE1(x)                               if cpe >= 1
        x = x + DropPath(Mix(LN(x) + APE))
        x = x + CPE2(x)                               if cpe == 2
        x = x + DropPath(MLP(LN(x)))                  if mlp_ratio > 0

    APE is a table of the network's (absolute position embedding). CPE is a 3x3
    depthwise convolution (conditional position encoding).

    Args:
        embed_dims (int): Number of channels C.
        mlp_ratio (float): Hidden channels of the MLP, divided by C. 0 leaves it out.
        drop_rate (float): Dropout rate in the MLP.
        drop_path_rate (float): Stochastic depth rate.
        ape (tuple[int, int], optional): Height and width of the table, None for none.
        cpe (int): Number of convolutional encodings, 0 to 2.
    """

    def __init__(
        self,
        embed_dims: int,
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
        ape: Optional[Tuple[int, int]],
        cpe: int,
    ) -> None:
        super().__init__()
        convs = [
            nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
            for _ in range(cpe)
        ]
        self.cpe1, self.cpe2 = (convs + [None, None])[:2]
        self.norm1 = nn.LayerNorm(embed_dims)
        self.ape = None
        if ape is not None:
            self.ape = nn.Parameter(torch.empty(*ape, embed_dims))
            nn.init.trunc_normal_(self.ape, std=0.02)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = self.mlp = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(embed_dims)
            self.mlp = MLP(embed_dims, int(embed_dims * mlp_ratio), drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        if self.cpe1 is not None:
            x = ops.depthwise_conv(x, self.cpe1, residual=True)
        u = ops.layer_norm(x, self.norm1)
        x = self.drop_path(x, self.mix(u if self.ape is None else u + self.ape))
        if self.cpe2 is not None:
            x = ops.depthwise_conv(x, self.cpe2, residual=True)
        if self.mlp is None or self.norm2 is None:
            return x
        return self.drop_path(x, self.mlp(ops.layer_norm(x, self.norm2)))

    def mix(self, u: Tensor) -> Tensor:
        """The branch that mixes tokens, (N, H, W, C) -> (N, H, W, C)."""
        raise NotImplementedError


class TransformerBlock(_PreNormBlock):
    """The block of the baseline: ``Mix(u) = proj(Mixer(u))``.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads.
        token_mixer (dict, optional): Config of the mixer, see :class:`TokenMixer`. The
            default type is :class:`LinearAttention`.
        qkv_bias (bool): Whether the mixer's projections have a bias.
            Defaults to True.
        **options: Arguments of :class:`_PreNormBlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        token_mixer: Optional[dict] = None,
        qkv_bias: bool = True,
        **options,
    ) -> None:
        super().__init__(embed_dims, **options)
        self.attn = build_token_mixer(
            token_mixer,
            LinearAttention,
            embed_dims=embed_dims,
            num_heads=num_heads,
            v_proj=True,
            qkv_bias=qkv_bias,
        )
        self.proj = nn.Linear(embed_dims, embed_dims)

    def mix(self, u: Tensor) -> Tensor:
        return self.proj(self.attn(u))


class MambaBlock(_PreNormBlock):
    """Mamba's block around a mixer, with E times the channels.

    ::

        v = SiLU(DWC(in_proj(u)))
        Mix(u) = out_proj(Mixer(v) o SiLU(act_proj(u)))

    Values are not projected again.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads.
        token_mixer (dict, optional): Config of the mixer, see :class:`TokenMixer`. The
            default type is :class:`LinearAttention`.
        qkv_bias (bool): Whether the mixer's projections have a bias.
            Defaults to True.
        expansion (float): E. Defaults to 1.
        **options: Arguments of :class:`_PreNormBlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        token_mixer: Optional[dict] = None,
        qkv_bias: bool = True,
        expansion: float = 1.0,
        **options,
    ) -> None:
        super().__init__(embed_dims, **options)
        inner = int(embed_dims * expansion)
        self.in_proj = nn.Linear(embed_dims, inner)
        self.act_proj = nn.Linear(embed_dims, inner)
        self.dwc = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.attn = build_token_mixer(
            token_mixer,
            LinearAttention,
            embed_dims=inner,
            num_heads=num_heads,
            v_proj=False,
            qkv_bias=qkv_bias,
        )
        self.out_proj = nn.Linear(inner, embed_dims)

    def mix(self, u: Tensor) -> Tensor:
        v = ops.depthwise_conv(self.in_proj(u), self.dwc, act=True)
        y = ops.gated_mixer(self.attn, v, self.act_proj(u), readable=MLLAAttention)
        return self.out_proj(y)
