# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .layer_norm import LayerNorm
from .mlla_block import MLP, LinearAttention, MLLABlock
from .patch_merging import PatchMerging
from .stem import Stem

__all__ = [
    'MLP',
    'LayerNorm',
    'LinearAttention',
    'MLLABlock',
    'PatchMerging',
    'Stem',
]
