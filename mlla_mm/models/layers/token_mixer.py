# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Token mixers: the parts of a block that ``token_mixer`` in a config swaps."""

from typing import Any, Dict, Optional, Type

from mmengine.registry import MODELS
from torch import Tensor, nn

from ... import ops
from ...arch import check_flags, check_int


def build_token_mixer(
    cfg: Optional[Dict[str, Any]], default: Type[nn.Module], **arguments: Any
) -> nn.Module:
    """Build the token mixer of a block.

    Args:
        cfg (dict, optional): The ``token_mixer`` of a config. What it says comes before
            the block's arguments. None stands for an empty dict.
        default (type): The class where ``cfg`` names no type.
        **arguments: What the block gives every mixer, see :class:`TokenMixer`.

    Raises:
        ValueError: If ``cfg`` is no dict, or has the block's ``embed_dims``.
    """
    if not isinstance(cfg, (dict, type(None))):
        raise ValueError(
            f"token_mixer must be a dict such as dict(type='{default.__name__}'), "
            f'got {cfg!r}.'
        )
    if cfg and 'embed_dims' in cfg:
        raise ValueError(
            f'token_mixer has embed_dims = {cfg["embed_dims"]!r}, which each block '
            'gives. Leave it out.'
        )
    return MODELS.build({'type': default, **arguments, **(cfg or {})})


class TokenMixer(nn.Module):
    """Base of attentions: projections to queries, keys and values.

    ``token_mixer=dict(type=NAME)`` of :class:`mlla_mm.models.MLLA` and
    :class:`mlla_mm.models.LinearAttentionSwin` puts a token mixer into each block. It
    is any module that is registered in MMEngine's ``MODELS``:

    - A block builds it with the keyword arguments ``embed_dims``, ``num_heads``,
      ``v_proj`` and ``qkv_bias`` below. The other keys of the dict are arguments, too.
      A key that is one of these four, ``num_heads=1`` for instance, comes before the
      block's. ``embed_dims`` alone may not be there.
    - A block calls it as ``y = mixer(x)`` with maps (N, H, W, C). Height and width can
      be any. Under autocast, ``x`` can be in half precision.
    - What needs queries, keys or values belongs to the mixer: feature maps, local
      (LePE) and rotary position encodings. The rest belongs to the block: norms, gate,
      output projection and residuals.
    - A method ``init_weights`` sets starting values other than those of its layers. It
      is called at the end of the network's construction, when linear layers have been
      initialised. That of MMEngine's ``BaseModule`` is called with the network's.

    Most mixers derive from this class, and define :meth:`attend` alone.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Blocks that project their input
            say False: the mixer's input itself is the values. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes as many as the values have, C / num_heads. Defaults to None.

    Raises:
        ValueError: If ``num_heads`` does not divide C, or an argument is impossible.
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
        check_int('num_heads', num_heads, 1)
        if qk_head_dims is not None:
            check_int('qk_head_dims', qk_head_dims, 1)
        check_flags(v_proj=v_proj, qkv_bias=qkv_bias)
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

    See :func:`mlla_mm.ops.naive.linear_attention`. LePE is a 3x3 depthwise convolution.

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
