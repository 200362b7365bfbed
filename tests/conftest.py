# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch

import mlla_mm  # noqa: F401  (before anything imports mmcv.ops)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
