# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA assembled op by op as it is defined: what faster assemblies are raced against.

Only the parameters are taken from the modules of :class:`MLLA`, never their forward
passes. Whatever makes those faster leaves this one as it is.
"""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlla_mm.models import MLLA
from mlla_mm.ops import pad_to_multiple

_EPS = 1e-6
_BASE = 10000.0


class PlainMLLA(MLLA):
    """MLLA by its plain definition, laid out like the authors' implementation.

    Tokens (N, L, C) go from block to block and become maps around every depthwise
    convolution; each projection is a product of its own; every block and call builds
    its rotation table; heads are split and merged by permutations; and the normaliser
    is a matrix product. Under float16 autocast that product can underflow, which
    :class:`MLLA` avoids: this model is for comparisons, not for training runs.

    Arguments, parameters and their names are those of :class:`MLLA`, and so are the
    outputs. It is not in the registry.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as PyTorch makes it
                weight = module.weight.data
                module.weight.data = weight.clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``, see :meth:`MLLA.forward`."""
        self._check_input(x)
        x = _stem(self.patch_embed, x)
        outs = []
        for i, stage in enumerate(self.layers):
            size = x.shape[2:]
            x = _to_tokens(x)
            for block in stage.blocks:
                if stage.with_cp and x.requires_grad:
                    x = checkpoint(_block, block, x, size, use_reentrant=False)
                else:
                    x = _block(block, x, size)
            if i in self.out_indices:
                out = _layer_norm(getattr(self, f'norm{i}'), x)
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


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias)


def _conv_layer(layer: nn.Module, x: Tensor, norm: bool = True, act: bool = True):
    """Convolution, then BatchNorm, then ReLU, on (N, C, H, W)."""
    conv = layer.conv
    x = F.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups
    )
    if norm:
        x = layer.norm(x)
    return F.relu(x, inplace=True) if act else x


def _stem(stem: nn.Module, x: Tensor) -> Tensor:
    """(N, in_channels, H, W) -> (N, C, ceil(H / 4), ceil(W / 4))."""
    x = _conv_layer(stem.conv1, pad_to_multiple(x, 4))
    x = x + _conv_layer(stem.conv2[1], _conv_layer(stem.conv2[0], x), act=False)
    return stem.drop(
        _conv_layer(stem.conv3[1], _conv_layer(stem.conv3[0], x), act=False)
    )


def _merge_patches(merging: nn.Module, x: Tensor) -> Tensor:
    """(N, d, H, W) -> (N, 2d, ceil(H / 2), ceil(W / 2))."""
    expand, reduce, project = merging.conv
    x = _conv_layer(expand, pad_to_multiple(x, 2), norm=False)
    return _conv_layer(project, _conv_layer(reduce, x, norm=False), act=False)


def _depthwise_conv(conv: nn.Module, x: Tensor, size: Tuple[int, int]) -> Tensor:
    """3x3 depthwise convolution of tokens (N, L, C)."""
    x = _to_map(x, size)
    x = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])
    return _to_tokens(x)


def _block(block: nn.Module, x: Tensor, size: Tuple[int, int]) -> Tensor:
    """(N, L, C) -> (N, L, C)."""
    x = x + _depthwise_conv(block.cpe1, x, size)
    shortcut = x
    x = _layer_norm(block.norm1, x)
    gate = F.silu(_linear(block.act_proj, x))
    v = F.silu(_depthwise_conv(block.dwc, _linear(block.in_proj, x), size))
    x = _linear(block.out_proj, _attention(block.attn, v, size) * gate)
    x = shortcut + block.drop_path(x)
    x = x + _depthwise_conv(block.cpe2, x, size)
    return x + block.drop_path(_mlp(block.mlp, _layer_norm(block.norm2, x)))


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    x = mlp.drop(F.gelu(_linear(mlp.fc1, x)))
    return mlp.drop(_linear(mlp.fc2, x))


def _attention(attn: nn.Module, v: Tensor, size: Tuple[int, int]) -> Tensor:
    """Linear attention with local position encoding, (N, L, C) -> (N, L, C)."""
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

    PyTorch has no complex arithmetic in half precision worth the name, so it is done in
    float32; on a CPU it is faster than the same in real numbers.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    table = _rotation_table(x.shape[1:], pairs)
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return rotated.flatten(-2).to(x.dtype)


def _rotation_table(shape: Tuple[int, int, int], like: Tensor) -> Tensor:
    """exp(i angle) for each position and channel pair, complex (H, W, C / 2)."""
    height, width, channels = shape
    num_freqs = channels // 4
    options = dict(dtype=like.dtype, device=like.device)
    freqs = _BASE ** (-torch.arange(num_freqs, **options) / num_freqs)
    rows = torch.arange(height, **options)[:, None, None] * freqs
    columns = torch.arange(width, **options)[None, :, None] * freqs
    map_shape = (height, width, num_freqs)
    angles = torch.cat([rows.expand(map_shape), columns.expand(map_shape)], dim=-1)
    return torch.polar(torch.ones_like(angles), angles)
