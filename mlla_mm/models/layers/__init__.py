# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .conv import ConvLayer
from .drop_path import DropPath
from .linear_attention import LinearAttention
from .mlla_block import MLP, MLLABlock
from .other_attentions import (
    EfficientAttention,
    EnhancedLinearAttention,
    FocusedLinearAttention,
    HydraAttention,
    SoftmaxAttention,
)
from .patch_merging import PatchMerging
from .stem import Stem
from .swin import MambaBlock, PatchEmbed, SwinPatchMerging, TransformerBlock
from .token_mixer import MLLAAttention, TokenMixer

__all__ = [
    'MLP',
    'ConvLayer',
    'DropPath',
    'EfficientAttention',
    'EnhancedLinearAttention',
    'FocusedLinearAttention',
    'HydraAttention',
    'LinearAttention',
    'MLLAAttention',
    'MLLABlock',
    'MambaBlock',
    'PatchEmbed',
    'PatchMerging',
    'SoftmaxAttention',
    'Stem',
    'SwinPatchMerging',
    'TokenMixer',
    'TransformerBlock',
]
