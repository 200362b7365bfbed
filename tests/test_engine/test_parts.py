# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from itertools import product

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mlla_mm.engine.parts import metrics_of, require_parts, require_whole_splits


@MODELS.register_module()
class Nothing(BaseModel):
    def forward(self, inputs, mode):
        return torch.zeros(1)


SPLITS = {
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('given', product([False, True], repeat=3))
def test_what_mmengine_takes_together(split, given, tmp_path):
    """Refused is what its runner refuses, and nothing else."""
    parts = {key: {} for key, is_given in zip(SPLITS[split], given) if is_given}
    cfg = Config(dict(model=dict(type='Nothing'), work_dir=str(tmp_path), **parts))

    def refused(make) -> str:
        try:
            make(cfg)
        except ValueError as error:
            return str(error)
        return ''

    ours = refused(require_whole_splits)
    assert bool(ours) == bool(refused(Runner.from_cfg))
    for key, is_given in zip(SPLITS[split], given):
        assert not ours or (f'{key}=None' in ours) == is_given


def test_a_schedule_without_an_optimizer():
    cfg = Config(dict(param_scheduler=dict(type='LinearLR')))
    with pytest.raises(ValueError, match='param_scheduler=None'):
        require_whole_splits(cfg)


def test_missing_parts_are_named():
    cfg = Config(dict(model=dict(), test_dataloader=None))
    require_parts(cfg, 'model', user='A test')
    with pytest.raises(ValueError, match='A test needs test_dataloader in'):
        require_parts(cfg, 'model', 'test_dataloader', user='A test')
    cfg.test_dataloader = 'coco'
    with pytest.raises(ValueError, match="test_dataloader is 'coco', .* a dict"):
        require_parts(cfg, 'model', 'test_dataloader', user='A test')


def test_metrics_of_evaluators():
    one = dict(type='A')
    for evaluator in (one, [one], dict(metrics=one), dict(type='E', metrics=[one])):
        assert metrics_of(evaluator) == [one]
    assert metrics_of(None) == []
