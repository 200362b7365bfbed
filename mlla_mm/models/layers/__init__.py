# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .conv import ConvLayer
from .drop_path import DropPath
from .mlla_block import MLP, LinearAttention, MLLABlock
from .patch_merging import PatchMerging
from .stem import Stem

__all__ = [
    'MLP',
    'ConvLayer',
    'DropPath',
    'LinearAttention',
    'MLLABlock',
    'PatchMerging',
    'Stem',
]
