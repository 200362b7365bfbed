# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recipes' optimisers, and which parameters have weight decay."""

import hashlib
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from mlla_mm.checkpoints.layout import to_own_names
from mlla_mm.engine.parts import replace_sync_bn

from ..reference import DATA, official_weights
from .authors import CONFIGS

RECIPES = {
    'classification': 'classification/mlla-t_8xb128_in1k.py',
    'detection': 'detection/mask-rcnn_mlla-t_fpn_1x_coco.py',
    'segmentation': 'segmentation/upernet_mlla-b_8xb2-160k_ade20k-512x512.py',
}


def authors_names(task: str) -> dict:
    """The authors' name of each of our parameters, where they differ."""
    if task != 'classification':
        return {}
    weights = official_weights('mlla-t')
    return dict(zip(to_own_names(weights), weights))


@pytest.mark.parametrize('task', RECIPES)
def test_parameters_without_weight_decay(task):
    expected = json.loads((DATA / 'training' / 'lr_groups.json').read_text())[task]
    cfg = Config.fromfile(CONFIGS / RECIPES[task])
    pytest.importorskip(cfg.default_scope)
    replace_sync_bn(cfg.model)
    # The mixed-precision wrapper exists with a GPU alone.
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    # Neither memory nor values are needed.
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(cfg.model)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer).__name__ == expected['optimizer']
    theirs = authors_names(task)
    names = {id(x): theirs.get(name, name) for name, x in model.named_parameters()}
    decayed, free = set(), set()
    for group in optimizer.param_groups:
        for key in ('lr', 'betas', 'eps'):
            recorded = expected[key]
            assert group[key] == (tuple(recorded) if key == 'betas' else recorded)
        assert group['weight_decay'] in (0, expected['weight_decay'])
        kind = decayed if group['weight_decay'] else free
        kind.update(names[id(x)] for x in group['params'])
    assert not decayed & free
    assert len(decayed | free) == expected['parameters'] == len(names)
    without = expected['without_weight_decay']
    assert free == set(without['names'])
    assert len(free) == without['count']
    digest = hashlib.sha256('\n'.join(sorted(free)).encode()).hexdigest()
    assert digest == without['sha256']
    assert decayed.issuperset(expected['with_weight_decay_examples'])
