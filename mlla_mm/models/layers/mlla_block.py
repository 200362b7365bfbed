# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Optional

from torch import Tensor, nn

from ... import ops
from .drop_path import DropPath
from .token_mixer import MLLAAttention, build_token_mixer


class MLP(nn.Module):
    """Linear layer, GELU (by the error function), dropout, linear layer, dropout.

    Args:
        embed_dims (int): Number of input and output channels.
        hidden_dims (int): Number of hidden channels.
        drop_rate (float): Dropout rate.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return ops.mlp(x, self.fc1, self.fc2, self.drop)


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
        mlp_ratio (float): Hidden channels of the MLP, divided by C. Defaults to 4.
        qkv_bias (bool): Whether the query-key projection has a bias.
            Defaults to True.
        drop_rate (float): Dropout rate in the MLP. Defaults to 0.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        token_mixer (dict, optional): Config of another mixer in the place of Attn, see
            :class:`TokenMixer`. None takes :class:`MLLAAttention`. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        token_mixer: Optional[dict] = None,
    ) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.in_proj = nn.Linear(embed_dims, embed_dims)
        self.act_proj = nn.Linear(embed_dims, embed_dims)
        self.dwc = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.attn = build_token_mixer(
            token_mixer,
            MLLAAttention,
            embed_dims=embed_dims,
            num_heads=num_heads,
            v_proj=False,
            qkv_bias=qkv_bias,
        )
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        self.drop_path = DropPath(drop_path_rate)
        self.cpe2 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = MLP(embed_dims, int(embed_dims * mlp_ratio), drop_rate)

    @ops.fused_block(attn=MLLAAttention, mlp=MLP, drop_path=DropPath)
    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        x = ops.depthwise_conv(x, self.cpe1, residual=True)
        u = ops.layer_norm(x, self.norm1, for_linear=True)
        v = ops.depthwise_conv(ops.linear(u, self.in_proj), self.dwc, act=True)
        gate = ops.linear(u, self.act_proj)
        y = ops.gated_mixer(self.attn, v, gate, readable=MLLAAttention)
        x = self.drop_path(x, ops.linear(y, self.out_proj))
        x = ops.depthwise_conv(x, self.cpe2, residual=True)
        u = ops.layer_norm(x, self.norm2, for_linear=True)
        return self.drop_path(x, self.mlp(u))
