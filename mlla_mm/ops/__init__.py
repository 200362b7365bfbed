# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The numerics of MLLA. Models call the ops by the names of this module."""

from .dispatch import (
    batch_norm,
    depthwise_conv,
    fused_block,
    is_fused,
    layer_norm,
    linear_relu,
    mlla_attention,
    mlp,
)
from .naive import linear_attention
from .rotary import rotary_embedding

__all__ = [
    'batch_norm',
    'depthwise_conv',
    'fused_block',
    'is_fused',
    'layer_norm',
    'linear_attention',
    'linear_relu',
    'mlla_attention',
    'mlp',
    'rotary_embedding',
]
