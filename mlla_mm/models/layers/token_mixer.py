# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Token mixers: the parts of a block that ``token_mixer`` in a config swaps."""

from typing import Any, Dict, Optional

from mmengine.registry import MODELS
from torch import Tensor, nn

from ... import ops


def build_token_mixer(
    cfg: Optional[Dict[str, Any]], default: str, **arguments: Any
) -> nn.Module:
    """Build the token mixer of a block.

    Args:
        cfg (dict, optional): The ``token_mixer`` of a config. What it says comes before
            the block's arguments. None stands for an empty dict.
        default (str): The type where ``cfg`` names none.
        **arguments: What the block gives every mixer, see :class:`TokenMixer`.

    Raises:
        ValueError: If ``cfg`` is no dict.
    """
    if not isinstance(cfg, (dict, type(None))):
        raise ValueError(
            f"token_mixer must be a dict such as dict(type='{default}'), got {cfg!r}."
        )
    return MODELS.build({'type': default, **arguments, **(cfg or {})})


class TokenMixer(nn.Module):
    """Base of attentions: projections to queries, keys and values.

    ``token_mixer=dict(type=NAME)`` of a backbone puts any module that is registered in
    MMEngine's ``MODELS`` into each block. A block builds it with the four arguments
    below, and calls it as ``y = mixer(x)`` with maps (N, H, W, C). What is around it
    belongs to the block: norms, the gate, the output projection and residuals. What
    needs queries, keys or values belongs to the mixer, local and rotary position
    encodings too.

    Most mixers derive from this class and define :meth:`attend`. One that needs
    starting values other than those of its layers has a method ``init_weights``. It is
    called when the network's linear layers have been initialised.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Blocks that project their input
            say False: the mixer's input itself is the values. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes as many as the values have, C / num_heads. Defaults to None.

    Raises:
        ValueError: If ``num_heads`` does not divide C.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        v_proj: bool = True,
        qkv_bias: bool = True,
        qk_head_dims: Optional[int] = None,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(
                f'num_heads = {num_heads} does not divide the {embed_dims} channels '
                f'of {type(self).__name__}.'
            )
        self.num_heads = num_heads
        self.qk_head_dims = qk_head_dims or embed_dims // num_heads
        self.qk = nn.Linear(embed_dims, 2 * num_heads * self.qk_head_dims, qkv_bias)
        self.v = nn.Linear(embed_dims, embed_dims, qkv_bias) if v_proj else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        q, k = self.qk(x).chunk(2, dim=-1)
        return self.attend(q, k, x if self.v is None else self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values.

        Args:
            q (Tensor): Queries, (N, H, W, num_heads * qk_head_dims).
            k (Tensor): Keys, of the same shape.
            v (Tensor): Values, (N, H, W, C).

        Returns:
            Tensor: (N, H, W, C).
        """
        raise NotImplementedError


@MODELS.register_module()
class MLLAAttention(TokenMixer):
    """The mixer of MLLA: linear attention with rotary and local position encoding.

    ::

        y = LinearAttention(q, k, v) + LePE(v)

    See :func:`mlla_mm.ops.linear_attention`. LePE is a 3x3 depthwise convolution.

    Args:
        embed_dims (int): Number of channels C, a multiple of 4.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. MLLA does not. Defaults to False.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        v_proj: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(embed_dims, num_heads, v_proj, qkv_bias)
        self.lepe = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = ops.linear_attention(q, k, v, self.num_heads)
        return y + ops.depthwise_conv(v, self.lepe)
