# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The numerics of MLLA. Models call the ops by the names of this module."""

from .dispatch import depthwise_conv, mlla_attention, mlp
from .naive import linear_attention
from .rotary import rotary_embedding

__all__ = [
    'depthwise_conv',
    'linear_attention',
    'mlla_attention',
    'mlp',
    'rotary_embedding',
]
