# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper

from mlla_mm.compat import pytorch
from mlla_mm.compat.pytorch import without_tf32
from mlla_mm.engine.batch_size import settle
from mlla_mm.engine.recipe import (
    compare,
    describe_recipe,
    describe_run,
    deviations,
    format_record,
    updates_per_epoch,
)

CONFIGS = Path(__file__).parents[2] / 'configs'


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


@pytest.mark.parametrize(
    'name, expected',
    [
        (
            'detection/mask-rcnn_mlla-t_fpn_1x_coco',
            {
                'total batch': 16,
                'batch per process': 2,
                'length': '12 epochs',
                'learning rate': 1e-4,
                'EMA decay': None,
                'mixed precision': 'float32',
                'pretrained weights': ['data/MLLA_T.pth'],
            },
        ),
        (
            'segmentation/upernet_mlla-b_8xb2-160k_ade20k-512x512',
            {'length': '160000 iterations', 'learning rate': 6e-5},
        ),
        (
            'classification/mlla-t_8xb128_in1k',
            {
                'total batch': 1024,
                'mixed precision': 'float16',
                'EMA decay': 0.9996 ** (1024 / 4096),
                'pretrained weights': None,
            },
        ),
    ],
)
def test_published_recipes(name, expected):
    cfg = read(name)
    recipe = describe_recipe(cfg)
    assert recipe['processes'] == 8
    assert {item: recipe[item] for item in expected} == expected
    assert deviations(compare(recipe, describe_run(cfg, 8))) in ([], ['TF32'])


def test_deviations():
    cfg = read('classification/mlla-t_8xb128_in1k')
    recipe = describe_recipe(cfg)
    cfg.optim_wrapper.type = AmpOptimWrapper  # the class, not its name
    settle(cfg, 2, keep=True)
    record = compare(recipe, describe_run(cfg, 2))
    assert deviations(record) == ['processes', 'accumulated batches']
    assert record['total batch'] == dict(recipe=1024, actual=1024)

    cfg = read('classification/mlla-t_8xb128_in1k')
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.train_cfg.max_epochs = 100
    settle(cfg, 4, scale=True)
    record = compare(recipe, describe_run(cfg, 4))
    assert deviations(record) == [
        'processes',
        'total batch',
        'length',
        'learning rate',
        'EMA decay',
        'mixed precision',
    ]
    assert record['learning rate'] == dict(recipe=1e-3, actual=5e-4)
    lines = format_record(record).splitlines()
    assert [line.split()[0] for line in lines if line.endswith('<- differs')] == [
        'processes', 'total', 'length', 'learning', 'EMA', 'mixed',
    ]  # fmt: skip


def test_tf32_under_either_setting(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(pytorch, '_TF32_IS_FORBIDDEN', False)
    cfg = read('detection/mask-rcnn_mlla-t_fpn_1x_coco')
    recipe = describe_recipe(cfg)
    with without_tf32():
        assert deviations(compare(recipe, describe_run(cfg, 8))) == ['TF32']
        if hasattr(torch.backends, 'fp32_precision'):
            torch.backends.cuda.matmul.fp32_precision = 'tf32'
        else:
            torch.backends.cuda.matmul.allow_tf32 = True
        assert deviations(compare(recipe, describe_run(cfg, 8))) == []


def test_a_config_that_does_not_state_its_batch_size():
    cfg = read('detection/mask-rcnn_mlla-t_fpn_1x_coco')
    cfg.pop('auto_scale_lr')
    recipe = describe_recipe(cfg)
    assert recipe['processes'] is recipe['total batch'] is None
    record = compare(recipe, describe_run(cfg, 3))
    assert deviations(record) in ([], ['TF32'])
    assert 'total batch          -' in format_record(record)


def test_a_config_that_leaves_its_weights_open():
    cfg = read('detection/mask-rcnn_mlla-t_fpn_1x_coco')
    del cfg.model.backbone.init_cfg.checkpoint
    assert describe_recipe(cfg)['pretrained weights'] is None


def test_a_config_that_options_complete():
    cfg = read('detection/mask-rcnn_mlla-t_fpn_1x_coco')
    written = copy.deepcopy(cfg)
    written.pop('train_cfg')
    recipe = describe_recipe(written)
    assert deviations(compare(recipe, describe_run(cfg, 3))) == []


@pytest.mark.parametrize(
    'images, processes, batch_size, drop_last, updates',
    [
        # ImageNet and COCO, see the recipes.
        (1281167, 8, 128, True, 1251),
        (1281167, 8, 64, True, 2502),
        (117266, 8, 2, False, 7330),
        (19, 4, 2, False, 3),
        (19, 4, 2, True, 2),
    ],
)
def test_updates_per_epoch(images, processes, batch_size, drop_last, updates):
    assert updates_per_epoch(images, processes, batch_size, drop_last) == updates
