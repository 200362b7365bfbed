# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA assembled op by op as it is defined: the reference of the races.

It takes the parameters from the modules of :class:`MLLA`, but never calls their forward
passes. A change that makes those faster does not change this assembly.
"""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.drop import drop_path
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlla_mm.models import MLLA
from mlla_mm.models.backbones.staged import Stage
from mlla_mm.models.layers import (
    MLP,
    ConvLayer,
    MLLAAttention,
    MLLABlock,
    PatchMerging,
    Stem,
)
from mlla_mm.ops import pad_to_multiple

_EPS = 1e-6
_BASE = 10000.0


class PlainMLLA(MLLA):
    """MLLA by its plain definition, laid out like the authors' implementation.

    Blocks take and give tokens (N, L, C), which become maps around every depthwise
    convolution. Each projection is a product of its own. Every block builds its
    rotation table in every call. Heads are split and merged by permutations. The
    normaliser is a matrix product. That product can underflow under float16 autocast,
    which :class:`MLLA` avoids: this class is for comparisons, not for training runs.

    Arguments, parameters, their names and the outputs are those of :class:`MLLA`. The
    class is not in the registry.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the layout of a new nn.Conv2d
                weight = module.weight.data
                module.weight.data = weight.clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``, see :meth:`MLLA.forward`."""
        self.check_input(x)
        x = _stem(self.patch_embed, x)
        outs = []
        for i, stage in enumerate(self.layers):
            height, width = x.shape[2:]
            size = height, width
            x = _to_tokens(x)
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                if stage.with_cp and x.requires_grad:
                    x = checkpoint(_block, block, x, size, use_reentrant=False)
                else:
                    x = _block(block, x, size)
            if i in self.out_indices:
                out = _layer_norm(self.get_submodule(f'norm{i}'), x)
                outs.append(_to_map(out, size).contiguous())
            if i == self.out_indices[-1]:
                break
            x = _merge_patches(stage.downsample, _to_map(x, size))
        return tuple(outs)


def _to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, L, C)."""
    return x.flatten(2).permute(0, 2, 1)


def _to_map(x: Tensor, size: Tuple[int, int]) -> Tensor:
    """(N, L, C) -> (N, C, H, W)."""
    return x.reshape(len(x), *size, -1).permute(0, 3, 1, 2)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias)


def _conv_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Convolution, then BatchNorm and ReLU if the layer has them, on (N, C, H, W)."""
    assert isinstance(layer, ConvLayer)
    conv = layer.conv
    x = F.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups
    )
    if layer.norm is not None:
        x = layer.norm(x)
    return x if layer.act is None else F.relu(x, inplace=True)


def _stem(stem: nn.Module, x: Tensor) -> Tensor:
    """(N, in_channels, H, W) -> (N, C, ceil(H / 4), ceil(W / 4))."""
    assert isinstance(stem, Stem)
    x = _conv_layer(stem.conv1, pad_to_multiple(x, 4))
    x = x + _conv_layer(stem.conv2[1], _conv_layer(stem.conv2[0], x))
    return stem.drop(_conv_layer(stem.conv3[1], _conv_layer(stem.conv3[0], x)))


def _merge_patches(merging: Optional[nn.Module], x: Tensor) -> Tensor:
    """(N, d, H, W) -> (N, 2d, ceil(H / 2), ceil(W / 2))."""
    assert isinstance(merging, PatchMerging)
    x = pad_to_multiple(x, 2)
    for layer in merging.conv:
        x = _conv_layer(layer, x)
    return x


def _depthwise_conv(conv: nn.Conv2d, x: Tensor, size: Tuple[int, int]) -> Tensor:
    """3x3 depthwise convolution of tokens (N, L, C)."""
    x = _to_map(x, size)
    x = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])
    return _to_tokens(x)


def _block(block: nn.Module, x: Tensor, size: Tuple[int, int]) -> Tensor:
    """(N, L, C) -> (N, L, C)."""
    assert isinstance(block, MLLABlock)
    x = x + _depthwise_conv(block.cpe1, x, size)
    shortcut = x
    x = _layer_norm(block.norm1, x)
    gate = F.silu(_linear(block.act_proj, x))
    v = F.silu(_depthwise_conv(block.dwc, _linear(block.in_proj, x), size))
    x = _linear(block.out_proj, _attention(block.attn, v, size) * gate)
    x = shortcut + _drop_path(block, x)
    x = x + _depthwise_conv(block.cpe2, x, size)
    return x + _drop_path(block, _mlp(block.mlp, _layer_norm(block.norm2, x)))


def _drop_path(block: MLLABlock, x: Tensor) -> Tensor:
    return drop_path(x, block.drop_path.drop_prob, block.training)


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    x = mlp.drop(F.gelu(_linear(mlp.fc1, x)))
    return mlp.drop(_linear(mlp.fc2, x))


def _attention(attn: nn.Module, v: Tensor, size: Tuple[int, int]) -> Tensor:
    """Linear attention with local position encoding, (N, L, C) -> (N, L, C)."""
    assert isinstance(attn, MLLAAttention)
    batch, tokens, channels = v.shape

    def split_heads(x: Tensor) -> Tensor:
        return x.reshape(batch, tokens, attn.num_heads, -1).permute(0, 2, 1, 3)

    def rotate(x: Tensor) -> Tensor:
        rotated = _rotary_embedding(x.reshape(batch, *size, channels))
        return split_heads(rotated)

    qk = _linear(attn.qk, v).reshape(batch, tokens, 2, channels)
    q, k = (F.elu(x) + 1 for x in qk.permute(2, 0, 1, 3))
    q_rotated, k_rotated = rotate(q), rotate(k)
    q, k = split_heads(q), split_heads(k)
    norm = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + _EPS)
    # Each factor takes half of 1 / n: the sum over many tokens stays in range.
    scale = tokens**-0.5
    kv = (k_rotated.transpose(-2, -1) * scale) @ (split_heads(v) * scale)
    y = (q_rotated @ kv * norm).permute(0, 2, 1, 3).reshape(v.shape)
    return y + _depthwise_conv(attn.lepe, v, size)


def _rotary_embedding(x: Tensor) -> Tensor:
    """Rotate channel pairs of (N, H, W, C) as complex numbers.

    The rotation is done in float32, because PyTorch has little complex arithmetic in
    half precision. On a CPU complex numbers are faster here than real ones.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    _, height, width, channels = x.shape
    table = _rotation_table(height, width, channels, pairs)
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return rotated.flatten(-2).to(x.dtype)


def _rotation_table(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """exp(i angle) for each position and channel pair, complex (H, W, C / 2)."""
    num_freqs = channels // 4

    def arange(end: int) -> Tensor:
        return torch.arange(end, dtype=like.dtype, device=like.device)

    freqs = _BASE ** (-arange(num_freqs) / num_freqs)
    rows = arange(height)[:, None, None] * freqs
    columns = arange(width)[None, :, None] * freqs
    map_shape = (height, width, num_freqs)
    angles = torch.cat([rows.expand(map_shape), columns.expand(map_shape)], dim=-1)
    return torch.polar(torch.ones_like(angles), angles)
