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
    """Outputs of backbone, neck and head differ by less than 1e-5."""
    cfg = Config.fromfile(NANO[scope])
    for part in ('decode_head', 'auxiliary_head'):
        if part in cfg.model:
            cfg.model[part].norm_cfg.type = 'BN'
    model = build(cfg).eval()
    images = torch.randn(2, 3, 70, 64)
    # The heads of a detector have no BatchNorm, and need proposals.
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


CONV, NORM = partial(nn.Conv2d, 2, 2, 1), partial(nn.BatchNorm2d, 2)


def shared():
    conv = CONV()
    return nn.ModuleList(nn.Sequential(conv, NORM()) for _ in range(2))


def norm_first():
    order = ('norm', 'act', 'conv')
    return ConvModule(2, 2, 1, norm_cfg=dict(type='BN'), order=order)


def with_hook():
    conv = CONV()
    conv.register_forward_hook(lambda *args: args[2] * 2)
    return nn.Sequential(conv, NORM())


def parametrised():
    conv = nn.utils.parametrizations.weight_norm(CONV())
    return nn.Sequential(conv, NORM())


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


REFUSED = {
    'used in several places': shared,
    'comes before': norm_first,
    'GELU lies between': lambda: nn.Sequential(CONV(), nn.GELU(), NORM()),
    'hooks': with_hook,
    'ParametrizedConv2d': parametrised,
    'Doubled': lambda: nn.Sequential(Doubled(2, 2, 1), NORM()),
    'running statistics': lambda: nn.Sequential(
        CONV(), NORM(track_running_stats=False)
    ),
    'or a weight': lambda: nn.Sequential(CONV(), NORM(affine=False)),
    'channels': lambda: nn.Sequential(nn.Conv2d(2, 4, 1), NORM()),
}


@pytest.mark.parametrize('problem', REFUSED)
def test_what_would_compute_something_else_is_refused(problem):
    model = nn.Sequential(nn.Sequential(CONV(), NORM()), REFUSED[problem]()).eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        fuse_conv_bn(model)
    assert problem in str(caught.value) and '1.' in str(caught.value)
    # Nothing was folded, not even the first BatchNorm.
    assert model.state_dict().keys() == weights.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value)


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match='in training'):
        fuse_conv_bn(nn.Sequential(CONV(), NORM()))
