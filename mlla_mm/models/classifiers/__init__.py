# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Classifiers on mmpretrain, which has to be installed to import this."""

from .mesa import MESAClassifier

__all__ = ['MESAClassifier']
