# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmpretrain's transforms with the same arguments and draws, and faster on the CPU.

Images are arrays of shape (H, W, C), BGR where they have colours. The other transforms
of mmpretrain may stand beside these. Importing this package needs mmpretrain.
"""

from .geometry import FastRandomFlip, FastRandomResizedCrop, FastResizeEdge
from .randaugment import (
    FastAutoContrast,
    FastBrightness,
    FastColorTransform,
    FastContrast,
    FastEqualize,
    FastRandAugment,
    FastSharpness,
    FastSolarize,
    FastSolarizeAdd,
    FastTranslate,
)

__all__ = [
    'FastAutoContrast',
    'FastBrightness',
    'FastColorTransform',
    'FastContrast',
    'FastEqualize',
    'FastRandAugment',
    'FastRandomFlip',
    'FastRandomResizedCrop',
    'FastResizeEdge',
    'FastSharpness',
    'FastSolarize',
    'FastSolarizeAdd',
    'FastTranslate',
]
