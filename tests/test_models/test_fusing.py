# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from functools import partial

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from torch import nn

from mlla_mm.compat.pytorch import BatchNorm
from mlla_mm.models.fusing import fuse_conv_bn

from ..nano import NANO, build


def norms(model):
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


@pytest.mark.parametrize('scope', NANO)
def test_features_stay(scope):
    """Within 1e-5 of their size, of backbone, neck and head."""
    cfg = Config.fromfile(NANO[scope])
    for part in ('decode_head', 'auxiliary_head'):
        if part in cfg.model:
            cfg.model[part].norm_cfg.type = 'BN'
    model = build(cfg).eval()
    images = torch.randn(2, 3, 70, 64)
    # A detector's heads have no BatchNorm, and want to know of objects.
    call = model.extract_feat if scope == 'mmdet' else partial(model, mode='tensor')
    with torch.no_grad():
        expected = call(images)
        assert norms(model)
        assert fuse_conv_bn(model) is model
        found = call(images)
    assert not norms(model)
    assert len(flat(found)) == len(flat(expected)) > 0
    for one, other in zip(flat(found), flat(expected)):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)]


def shared():
    conv = nn.Conv2d(1, 1, 1)
    return nn.ModuleList(
        nn.Sequential(conv, nn.BatchNorm2d(1).eval()) for _ in range(2)
    )


def norm_first():
    return nn.Sequential(
        nn.Conv2d(1, 1, 1),
        ConvModule(1, 1, 1, norm_cfg=dict(type='BN'), order=('norm', 'act', 'conv')),
    )


@pytest.mark.parametrize(
    'make, name, problem', [(shared, '0.0', 'several'), (norm_first, '1', 'before')]
)
def test_what_would_compute_something_else_is_refused(make, name, problem):
    model = make()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        fuse_conv_bn(model)
    assert f'{name} ' in str(caught.value) and problem in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value)
