# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .naive import linear_attention
from .rotary import rotary_embedding

__all__ = ['linear_attention', 'rotary_embedding']
