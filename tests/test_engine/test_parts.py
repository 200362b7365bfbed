# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from itertools import product

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mlla_mm.engine.parts import (
    metrics_of,
    parts_of,
    paths_of,
    require_kinds,
    require_parts,
    require_whole_splits,
    value_at,
)

from ..bad_data import assert_says


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


@pytest.mark.parametrize(
    'cfg, words',
    [
        (dict(train_dataloader='coco'), ["train_dataloader is 'coco'", 'a dict']),
        (dict(model=[dict(type='A')]), ['model is ', 'a dict']),
        (dict(optim_wrapper=dict(optimizer='AdamW')), ["wrapper.optimizer is 'AdamW'"]),
        (dict(optim_wrapper=3), ['optim_wrapper is 3']),
        (dict(val_evaluator='IoUMetric'), ["is 'IoUMetric'", 'a dict or a list']),
        (dict(default_hooks=[dict(type='EMAHook')]), ['default_hooks is', 'a dict']),
        (dict(env_cfg=dict(mp_cfg='fork')), ["env_cfg.mp_cfg is 'fork'"]),
        (dict(randomness=3), ['randomness is 3', 'a dict']),
        (dict(auto_scale_lr=True), ['auto_scale_lr is True', 'a dict']),
        (dict(load_from=True), ['load_from is True', 'a text']),
        (dict(default_scope=['mmdet']), ["default_scope is ['mmdet']", 'a text']),
    ],
)
def test_values_of_another_kind(cfg, words):
    with pytest.raises(ValueError) as caught:
        require_kinds(Config(cfg))
    assert_says(caught.value, *words)
    require_kinds(Config(dict(cfg, runner_type='MyRunner')))


def test_values_of_the_right_kind(tmp_path):
    """None, objects and several optimizers are left to MMEngine."""
    one, model = dict(type='A'), torch.nn.Identity()
    for cfg in (
        dict(model=model, train_dataloader=None, work_dir=tmp_path, val_cfg={}),
        dict(val_evaluator=(one,), param_scheduler=dict(a=[one], b=one)),
        dict(optim_wrapper=dict(a=one, constructor='B'), visualizer=None),
    ):
        require_kinds(Config(cfg))


def test_metrics_of_evaluators():
    one = dict(type='A')
    for evaluator in (one, [one], dict(metrics=one), dict(type='E', metrics=[one])):
        assert metrics_of(evaluator) == [one]
    assert metrics_of(None) == []


def test_parts_and_their_keys():
    """Each before what is in it, also in lists."""
    part = dict(a=dict(b=1), c=[dict(d=dict(e=2)), 3])
    config = dict(part, f='x')
    assert list(parts_of(config)) == [config, {'b': 1}, {'d': {'e': 2}}, {'e': 2}]
    keys = ['.'.join(path) for path, _ in paths_of(Config(config))]
    assert keys == ['a', 'a.b', 'c', 'c.0', 'c.0.d', 'c.0.d.e', 'c.1', 'f']


def test_a_value_by_its_key():
    cfg = Config(dict(a=dict(b=dict(c=1)), d=[dict(e=2)], f=None))
    assert value_at(cfg, 'a.b.c') == 1
    assert value_at(cfg, 'd') == [dict(e=2)]
    for key in ('a.x', 'a.b.c.d', 'd.e', 'f.g', 'x'):
        assert value_at(cfg, key) is None
