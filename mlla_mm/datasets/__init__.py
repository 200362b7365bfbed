# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from . import corrupt_images

__all__ = ['corrupt_images']
