# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Classifiers built on mmpretrain. Importing this module needs mmpretrain."""

from .batch_augments import ReversedCutMix, ReversedMixup
from .data_preprocessor import ErasingDataPreprocessor
from .mesa import MESAClassifier

__all__ = [
    'ErasingDataPreprocessor',
    'MESAClassifier',
    'ReversedCutMix',
    'ReversedMixup',
]
