# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .backbones import MLLA
from .weights import PUBLISHED_WEIGHTS, load_pretrained, require_weights

__all__ = ['MLLA', 'PUBLISHED_WEIGHTS', 'load_pretrained', 'require_weights']
