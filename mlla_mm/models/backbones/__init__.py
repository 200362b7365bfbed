# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .linear_attention_swin import LinearAttentionSwin
from .mlla import MLLA

__all__ = ['MLLA', 'LinearAttentionSwin']
