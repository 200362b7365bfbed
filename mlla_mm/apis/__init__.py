# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a user calls: models by name, and predictions on pictures.

mmdet, mmseg and mmpretrain are imported only when a config needs them.
"""

from .inferencer import Inferencer
from .model import get_model, load_model

__all__ = ['Inferencer', 'get_model', 'load_model']
