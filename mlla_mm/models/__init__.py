# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .backbones import MLLA, LinearAttentionSwin

__all__ = ['MLLA', 'LinearAttentionSwin']
