# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The numerics of MLLA. Models call the ops through this module."""

from .dispatch import (
    cast_once,
    conv_layer,
    depthwise_conv,
    fused_block,
    gated_mixer,
    layer_norm,
    linear,
    mlla_attention,
    mlp,
    patch_merging,
)
from .naive import EPS, linear_attention
from .padding import pad_to_multiple
from .rotary import rotary_embedding

__all__ = [
    'EPS',
    'cast_once',
    'conv_layer',
    'depthwise_conv',
    'fused_block',
    'gated_mixer',
    'layer_norm',
    'linear',
    'linear_attention',
    'mlla_attention',
    'mlp',
    'pad_to_multiple',
    'patch_merging',
    'rotary_embedding',
]
