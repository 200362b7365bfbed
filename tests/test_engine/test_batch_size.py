# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
from mmengine.config import Config

from mlla_mm.engine.batch_size import settle, total_batch_size
from mlla_mm.engine.recipe import describe_run


def make(**more) -> Config:
    cfg = dict(
        train_dataloader=dict(
            batch_size=2, sampler=dict(type='DefaultSampler'), dataset=dict()
        ),
        train_cfg=dict(type='SeededEpochBasedTrainLoop', max_epochs=12),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        auto_scale_lr=dict(enable=False, base_batch_size=16),
    )
    return Config({**cfg, **more})


@pytest.mark.parametrize(
    'world_size, words, unfit',
    [
        (4, ['8 (4 processes x 2)', "recipe's is 16", '--keep-batch-size'], None),
        (3, ['6 (3 processes x 2)', '--auto-scale-lr'], '--keep-batch-size'),
        (16, ['32 (16 processes x 2)', '--auto-scale-lr'], '--keep-batch-size'),
    ],
)
def test_another_batch_size_is_announced(world_size, words, unfit):
    cfg = make()
    notice = settle(cfg, world_size)
    assert all(word in notice for word in words)
    assert unfit is None or unfit not in notice
    assert cfg.to_dict() == make().to_dict()


@pytest.mark.parametrize('options', [{}, dict(scale=True)])
def test_the_recipes_batch_size_changes_nothing(options):
    cfg = make()
    assert settle(cfg, 8, **options) is None
    assert cfg.to_dict() == make().to_dict()


def test_accumulated_gradients_count():
    accumulating = dict(accumulative_counts=4, optimizer=dict(type='SGD', lr=1.0))
    assert settle(make(optim_wrapper=accumulating), 2) is None
    cfg = make(optim_wrapper=accumulating)
    assert 'scaled by 0.5' in settle(cfg, 1, scale=True)
    assert cfg.optim_wrapper.optimizer.lr == 0.5


def test_the_batch_size_of_pytorch():
    cfg = make()
    del cfg.train_dataloader.batch_size
    assert total_batch_size(cfg, 4) == 4
    assert '8 processes x 1' in settle(cfg, 8)


def test_keeping_it_accumulates_what_is_missing():
    cfg = make(auto_scale_lr=dict(enable=True, base_batch_size=16))
    assert '2 processes x 2 x 4' in settle(cfg, 2, keep=True)
    assert cfg.train_cfg.micro_batches == 4
    # The learning rate stays the recipe's.
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    assert not cfg.auto_scale_lr.enable
    # The saved config can be run again, also on another number of processes.
    assert settle(cfg, 2) is None
    assert '4 processes x 2 x 2' in settle(cfg, 4, keep=True)
    assert cfg.train_cfg.micro_batches == 2
    assert settle(cfg, 8, keep=True) is None


@pytest.mark.parametrize(
    'changes, world_size, message',
    [
        (
            {},
            3,
            r'3 processes x 2 images does not divide .* of 16\. .* fit 3 processes: '
            r'none\. Numbers of processes that fit 2 images each: 1, 2, 4, 8\.$',
        ),
        (
            {},
            16,
            r'train_dataloader\.batch_size that fit 16 processes: 1\.',
        ),
        (
            dict(optim_wrapper=dict(accumulative_counts=2)),
            2,
            'says 2 already. Remove optim_wrapper.accumulative_counts',
        ),
        (
            dict(train_cfg=dict(type='MyLoop', max_epochs=1)),
            2,
            "train_cfg = dict.type='SeededEpochBasedTrainLoop'.",
        ),
        (
            dict(train_cfg=dict(type='IterBasedTrainLoop', max_iters=1)),
            2,
            "train_cfg = dict.type='SeededIterBasedTrainLoop'.",
        ),
        (dict(auto_scale_lr=dict()), 2, 'needs auto_scale_lr.base_batch_size'),
    ],
)
def test_it_cannot_always_be_kept(changes, world_size, message):
    with pytest.raises(ValueError, match=message):
        settle(make(**changes), world_size, keep=True)


def test_scaling():
    cfg = make(
        param_scheduler=[
            dict(type='LinearLR', start_factor=1e-3),
            dict(type='CosineAnnealingLR', eta_min=1e-6),
        ],
        custom_hooks=[
            dict(type='mmengine.EMAHook', momentum=0.19),
            dict(type='MESAHook', decay=0.81),
            dict(type='MESAHook'),
        ],
    )
    assert '16. The learning rate is scaled by 0.5' in settle(cfg, 4, scale=True)
    assert cfg.optim_wrapper.optimizer.lr == 5e-5
    assert cfg.param_scheduler[0].start_factor == 1e-3  # of the scaled rate
    assert cfg.param_scheduler[1].eta_min == 5e-7
    # Two updates of half the images keep as much of the average as one of the recipe's.
    ema, mesa, following = cfg.custom_hooks
    assert 1 - ema.momentum == pytest.approx(0.81**0.5)
    assert mesa.decay == pytest.approx(0.9)
    assert 'decay' not in following
    # The config is now a recipe for this batch size. MMEngine must not scale again.
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8)
    assert settle(cfg, 4) is None


def test_the_config_may_ask_mmengine_for_scaling():
    cfg = make(auto_scale_lr=dict(enable=True, base_batch_size=16))
    assert 'MMEngine scales the learning rate' in settle(cfg, 16)
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    assert cfg.auto_scale_lr.enable


def test_scaling_needs_the_recipes_batch_size():
    with pytest.raises(ValueError, match='--auto-scale-lr needs auto_scale_lr.base_b'):
        settle(make(auto_scale_lr=dict()), 4, scale=True)


@pytest.mark.parametrize(
    'wrapper',
    [
        dict(optimizer=dict(type='Adadelta')),
        dict(constructor='Mine', one=dict(optimizer=dict(type='SGD', lr=1.0))),
    ],
)
def test_scaling_needs_one_rate(wrapper):
    """Without it nothing else fails, as with several optimizers."""
    cfg = make(optim_wrapper=wrapper, model=dict())
    assert 'total batch size is 8' in settle(cfg, 4)
    assert describe_run(cfg, 4)['learning rate'] is None
    with pytest.raises(ValueError, match=r'optim_wrapper\.optimizer\.lr'):
        settle(cfg, 4, scale=True)


@pytest.mark.parametrize('schedule', [None, dict(type='A', eta_min=1.0), []])
def test_scaling_any_schedule(schedule):
    cfg = make(param_scheduler=schedule)
    settle(cfg, 4, scale=True)
    assert cfg.optim_wrapper.optimizer.lr == 5e-5
    assert not schedule or cfg.param_scheduler.eta_min == 0.5
