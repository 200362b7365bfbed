# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The numerics of MLLA. Models call the ops through this module."""

from .dispatch import (
    conv_layer,
    depthwise_conv,
    fused_block,
    gated_mixer,
    layer_norm,
    mlla_attention,
    mlp,
    patch_merging,
)
from .naive import EPS, linear_attention
from .padding import pad_to_multiple
from .rotary import rotary_embedding

__all__ = [
    'EPS',
    'conv_layer',
    'depthwise_conv',
    'fused_block',
    'gated_mixer',
    'layer_norm',
    'linear_attention',
    'mlla_attention',
    'mlp',
    'pad_to_multiple',
    'patch_merging',
    'rotary_embedding',
]
