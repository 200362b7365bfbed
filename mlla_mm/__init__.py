# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA (Mamba-Like Linear Attention) for OpenMMLab.

Importing the package registers everything that it brings in MMEngine's registries.
"""

# First of all: whatever imports mmcv.ops afterwards needs ``mmcv._ext``.
from .ops import mmcv_ext

mmcv_ext.install()

from . import models  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ['__version__', 'models']
