# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
