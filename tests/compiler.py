# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""For tests that compile a model."""

import pytest

from mlla_mm.compat.pytorch import COMPILES

needs_compiler = pytest.mark.skipif(not COMPILES, reason='PyTorch 2.1 takes too long')
