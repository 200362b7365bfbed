# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Classifiers built on mmpretrain. Importing this module needs mmpretrain."""

from .mesa import MESAClassifier

__all__ = ['MESAClassifier']
