# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checkpoints: read safely, fitted to a network, found, and published."""

from . import schemes
from .pretrained import PUBLISHED_WEIGHTS, load_pretrained, require_weights

__all__ = ['PUBLISHED_WEIGHTS', 'load_pretrained', 'require_weights', 'schemes']
