# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch


def needs_gpu(test):
    """Mark a test that a machine without a GPU skips."""
    no_gpu = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason='needs a GPU')(test))
