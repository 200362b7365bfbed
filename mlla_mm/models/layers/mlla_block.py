# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import Tensor, nn

from ... import ops
from .drop_path import DropPath


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
        self.lepe = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def forward(self, v: Tensor, gate: Tensor) -> Tensor:
        """Attend to a map.

        Args:
            v (Tensor): Values, from which queries and keys are projected, (N, H, W, C).
            gate (Tensor): Gate before SiLU, (N, H, W, C).

        Returns:
            Tensor: (N, H, W, C).
        """
        return ops.mlla_attention(self.qk(v), v, gate, self.lepe, self.num_heads)


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
        self.cpe1 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.in_proj = nn.Linear(embed_dims, embed_dims)
        self.act_proj = nn.Linear(embed_dims, embed_dims)
        self.dwc = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.attn = LinearAttention(embed_dims, num_heads, qkv_bias)
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        self.drop_path = DropPath(drop_path_rate)
        self.cpe2 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = MLP(embed_dims, int(embed_dims * mlp_ratio), drop_rate)

    @ops.fused_block(attn=LinearAttention, mlp=MLP, drop_path=DropPath)
    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        x = ops.depthwise_conv(x, self.cpe1, residual=True)
        u = ops.layer_norm(x, self.norm1)
        v = ops.depthwise_conv(self.in_proj(u), self.dwc, act=True)
        x = self.drop_path(x, self.out_proj(self.attn(v, gate=self.act_proj(u))))
        x = ops.depthwise_conv(x, self.cpe2, residual=True)
        return self.drop_path(x, self.mlp(ops.layer_norm(x, self.norm2)))
