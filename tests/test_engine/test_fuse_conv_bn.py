# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pickle

import pytest
import torch
from mmengine.hooks import EMAHook

from mlla_mm.compat.pytorch import BatchNorm
from mlla_mm.engine.hooks import FuseConvBNHook

from .test_compile import train


def outputs(folder, hooks):
    """Outputs of a test, and the model after it."""
    folder.mkdir()
    torch.manual_seed(0)
    runner = train(folder, False, hooks=hooks, flow='test')
    with (folder / 'x.pkl').open('rb') as file:
        return torch.stack(pickle.load(file)), runner.model


@pytest.mark.parametrize('hooks', [[], [EMAHook]], ids=['plain', 'averaged'])
def test_results_stay(tmp_path, hooks):
    expected, model = outputs(tmp_path / 'plain', [kind() for kind in hooks])
    assert any(isinstance(module, BatchNorm) for module in model.modules())
    hooks = [FuseConvBNHook(), *(kind() for kind in hooks)]
    found, model = outputs(tmp_path / 'fused', hooks)
    assert not any(isinstance(module, BatchNorm) for module in model.modules())
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
