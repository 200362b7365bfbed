# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What counts epochs in a loop of iterations, by the check and in MMEngine's runs."""

import copy
import json
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook
from mmengine.optim import ConstantLR
from mmengine.registry import (
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    PARAM_SCHEDULERS,
)
from mmengine.runner import IterBasedTrainLoop, LogProcessor, Runner

from mlla_mm.checks.units import IntervalError, check_checkpoints, check_units

from .. import one_weight  # noqa: F401  (registers its model)
from ..bad_data import CLS, DET, SEG, assert_says, config

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

LENGTH = 6


@METRICS.register_module()
class Weight(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(weight=results[0])


@LOOPS.register_module()
class LoopWithEpochs(IterBasedTrainLoop):
    """Somebody's own loop, which may end epochs."""


@HOOKS.register_module()
class SaveByIteration(CheckpointHook):
    def __init__(self, interval, by_epoch=False):
        super().__init__(interval, by_epoch)


@PARAM_SCHEDULERS.register_module()
class StepByIteration(ConstantLR):
    def __init__(self, optimizer, by_epoch=False, **kwargs):
        super().__init__(optimizer, by_epoch=by_epoch, **kwargs)


@LOG_PROCESSORS.register_module()
class LogByIteration(LogProcessor):
    def __init__(self, by_epoch=False, **kwargs):
        super().__init__(by_epoch=by_epoch, **kwargs)


def in_iterations(work_dir='work', **changes) -> Config:
    """A run of six iterations whose units are right, with changes."""
    loader = dict(
        batch_size=1,
        dataset=[dict(inputs=torch.ones(1))] * LENGTH,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    loop = dict(type='IterBasedTrainLoop', max_iters=LENGTH, val_interval=2)
    cfg = Config(
        dict(
            model=dict(type='OneWeight'),
            work_dir=str(work_dir),
            train_dataloader=loader,
            val_dataloader=copy.deepcopy(loader),
            train_cfg=loop,
            val_cfg=dict(),
            val_evaluator=dict(type='Weight'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=3)
            ],
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
                logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            ),
            log_processor=dict(by_epoch=False),
            default_scope='mmengine',
            experiment_name=f'units_{os.urandom(4).hex()}',
        )
    )
    for key, value in changes.items():
        set_value(cfg, key, value)
    return cfg


def in_epochs(work_dir) -> Config:
    """The same run in three epochs of two iterations."""
    cfg = in_iterations(
        work_dir, train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3)
    )
    cfg.train_dataloader.batch_size = 3
    return cfg


def set_value(cfg, key, value):
    *parents, name = key.split('.')
    for parent in parents:
        cfg = cfg[int(parent) if parent.isdigit() else parent]
    cfg[name] = value


def train(cfg) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def logged(work_dir) -> list:
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(work_dir) -> list:
    return sorted(path.name for path in work_dir.glob('*.pth'))


def test_right_units_do_what_they_say(tmp_path):
    cfg = in_iterations(tmp_path)
    check_units(cfg)
    train(cfg)
    assert checkpoints(tmp_path) == ['iter_2.pth', 'iter_4.pth', 'iter_6.pth']
    entries = logged(tmp_path)
    assert [x['step'] for x in entries if 'weight' in x] == [2, 4, 6]
    assert len({x['lr'] for x in entries if 'lr' in x}) == 3


CHECKPOINT, LOGGER = 'default_hooks.checkpoint', 'default_hooks.logger'
WRONG = {
    'checkpoint': {f'{CHECKPOINT}.by_epoch': True},
    "checkpoint by MMEngine's default": {CHECKPOINT: dict(type='CheckpointHook',
                                                          interval=1)},
    'metrics': {f'{LOGGER}.log_metric_by_epoch': True},
    'logs': {'log_processor.by_epoch': True},
    "logs by MMEngine's default": {'log_processor': dict(window_size=2)},
    'rate': {'param_scheduler.0.by_epoch': True},
    "rate by MMEngine's default": {
        'param_scheduler': dict(type='LinearLR', start_factor=0.5, end=3)},
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_what_is_refused_never_happened(tmp_path, case):
    cfg = in_iterations(tmp_path, **WRONG[case])
    with pytest.raises(ValueError) as caught:
        check_units(cfg)
    assert_says(caught.value, 'epoch is True', '=False')
    assert str(caught.value).count('\n') == 1

    train(cfg)
    entries = logged(tmp_path)
    if 'checkpoint' in case:
        assert checkpoints(tmp_path) == ['epoch_1.pth']
    elif 'metrics' in case:
        assert {x['step'] for x in entries if 'weight' in x} == {0}
    elif 'rate' in case:
        assert {x['lr'] for x in entries if 'lr' in x} == {0.05}
    else:
        log = next(tmp_path.glob('*/*.log')).read_text()
        assert log.count('Epoch(train) [1]') == LENGTH and 'Epoch(val) [0]' in log


def test_a_default_hook_of_mmengine_that_the_config_does_not_name(tmp_path):
    cfg = in_iterations(tmp_path)
    del cfg.default_hooks['checkpoint']
    with pytest.raises(ValueError, match=f'{CHECKPOINT}.by_epoch is True'):
        check_units(cfg)
    train(cfg)
    assert checkpoints(tmp_path) == ['epoch_1.pth']


def test_one_message_has_all_of_them():
    cfg = config(SEG)
    cfg.log_processor = dict(type='LogProcessor')
    cfg.param_scheduler[1].by_epoch = True
    cfg.default_hooks.checkpoint = dict(type='WholeCheckpointHook', interval=1)
    cfg.default_hooks.logger = dict(type='MainProcessLoggerHook')
    cfg.custom_hooks = [dict(type='EMAHook', begin_epoch=3)]
    with pytest.raises(ValueError) as caught:
        check_units(cfg)
    words = [
        'log_processor.by_epoch=False',
        'param_scheduler.1.by_epoch=False',
        'default_hooks.checkpoint.by_epoch=False',
        'default_hooks.logger.log_metric_by_epoch=False',
        'custom_hooks.0.begin_epoch=0',
    ]
    assert_says(caught.value, *words)
    assert str(caught.value).count('\n') == len(words)


HOOKS = [
    (dict(type='EMAHook', begin_epoch=2), ['begin_epoch is 2', 'begin_iter']),
    (dict(type='MESAHook'), ['start is 0.25', 'start=0.0', 'SeededEpochBased']),
    (dict(type='MESAHook', start=1.0), ['start is 1.0']),
    (dict(type='mmdet.YOLOXModeSwitchHook'), ['num_last_epochs is 15', 'at the start']),
    (dict(type='mmdet.PipelineSwitchHook', switch_epoch=2, switch_pipeline=[]),
     ['switch_epoch is 2', 'never']),
    (dict(type='mmpretrain.SwitchRecipeHook', schedule=[
        dict(action_epoch=1), dict(action_epoch=5)]), ['schedule is [1, 5]', 'never']),
]  # fmt: skip


@pytest.mark.parametrize('hook, words', HOOKS)
def test_hooks_of_epochs(hook, words):
    cfg = in_iterations(custom_hooks=[hook])
    with pytest.raises(ValueError) as caught:
        check_units(cfg)
    assert_says(caught.value, 'custom_hooks.0.', *words)
    cfg.train_cfg = dict(type='SeededEpochBasedTrainLoop', max_epochs=6)
    check_units(cfg)


RIGHT = {
    'hooks': {'custom_hooks': [
        dict(type='EMAHook', begin_epoch=1),
        dict(type='EMAHook', begin_iter=3),
        dict(type='MESAHook', start=0),
        dict(type='mmdet.PipelineSwitchHook', switch_epoch=0, switch_pipeline=[]),
        dict(type='mmpretrain.SwitchRecipeHook', schedule=[dict(action_epoch=1)]),
    ]},
    'the last checkpoint alone': {CHECKPOINT: dict(type='CheckpointHook')},
    'no checkpoint hook': {CHECKPOINT: None},
    'converted': {'param_scheduler': dict(
        type='LinearLR', end=1, convert_to_iter_based=True)},
    'after validations': {'param_scheduler': dict(
        type='ReduceOnPlateauLR', monitor='weight')},
    'no schedule': {'param_scheduler': None},
    'no validation': {'train_cfg.val_begin': LENGTH + 9, 'val_cfg': None},
    'an average of the last update': {
        'custom_hooks': [dict(type='EMAHook', begin_iter=LENGTH)]},
    'no validation, as mmdet writes it': {'train_cfg.val_begin': LENGTH + 1},
    'a loop of its own, derived': {
        'train_cfg.type': 'LoopWithEpochs', f'{CHECKPOINT}.by_epoch': True},
    'a class of its own': {
        'train_cfg.type': LoopWithEpochs, f'{CHECKPOINT}.by_epoch': True},
    'own parts with other defaults': {
        CHECKPOINT: dict(type='SaveByIteration', interval=2),
        'param_scheduler': dict(type='StepByIteration', end=2),
        'log_processor': dict(type='LogByIteration')},
    'a loop of its own': {'train_cfg.type': 'OwnLoop', f'{CHECKPOINT}.by_epoch': True},
    "mmdet's loops of iterations": {LOGGER: dict(type='LoggerHook')},
}  # fmt: skip


@pytest.mark.parametrize('case', RIGHT)
def test_what_is_right(case):
    check_units(in_iterations(**RIGHT[case]))


@pytest.mark.parametrize('scope', [CLS, DET, SEG])
def test_demos(scope):
    check_units(config(scope))


def test_a_plateau_acts_after_validations_of_a_loop_of_iterations(tmp_path):
    plateau = dict(type='ReduceOnPlateauLR', monitor='weight', rule='less', patience=0)
    cfg = in_iterations(tmp_path, param_scheduler=plateau)
    check_units(cfg)
    train(cfg)
    assert len({x['lr'] for x in logged(tmp_path) if 'lr' in x}) > 1
    cfg.param_scheduler.begin = 1  # an epoch
    with pytest.raises(ValueError, match=r'param_scheduler\.by_epoch'):
        check_units(cfg)


@pytest.mark.parametrize(
    'scope, changes, words',
    [
        (SEG, {'train_cfg.max_iters': 100, 'train_cfg.val_begin': 400},
         ['train_cfg.val_begin is 400', '100 iterations', 'val_begin=100',
          'val_cfg=None']),
        (DET, {'train_cfg.val_begin': 6}, ['val_begin is 6', '4 epochs']),
        (DET, {'custom_hooks': [dict(type='EMAHook', begin_epoch=9)]},
         ['custom_hooks.0.begin_epoch is 9', '4 epochs']),
        (SEG, {'train_cfg.max_iters': 100,
               'custom_hooks': [dict(type='EMAHook', begin_iter=101)]},
         ['custom_hooks.0.begin_iter is 101', '100 iterations']),
    ],
)  # fmt: skip
def test_beginnings_after_the_end(scope, changes, words):
    cfg = config(scope)
    for key, value in changes.items():
        set_value(cfg, key, value)
    with pytest.raises(ValueError) as caught:
        check_units(cfg)
    assert_says(caught.value, *words)


def test_checkpoints_by_iteration_in_a_loop_of_epochs(tmp_path):
    cfg = in_epochs(tmp_path)
    cfg.default_hooks.checkpoint.interval = LENGTH
    check_units(cfg)
    check_checkpoints(cfg, LENGTH)
    cfg.default_hooks.checkpoint.interval = LENGTH + 1
    with pytest.raises(IntervalError) as caught:
        check_checkpoints(cfg, LENGTH)
    assert_says(
        caught.value,
        'default_hooks.checkpoint.interval is 7 iterations',
        'has 6',
        'default_hooks.checkpoint.by_epoch=True',
    )
    train(cfg)
    assert checkpoints(tmp_path) == [f'iter_{LENGTH}.pth']
    # Epochs, and a loop that counts as the checkpoints do.
    cfg.default_hooks.checkpoint.by_epoch = True
    check_checkpoints(cfg, LENGTH)
    many = {'default_hooks.checkpoint.interval': LENGTH + 1}
    check_checkpoints(in_iterations(**many), LENGTH)


def test_logs_by_iteration_in_a_loop_of_epochs(tmp_path):
    """They are right, so they are no error."""
    cfg = in_epochs(tmp_path)
    check_units(cfg)
    train(cfg)
    entries = logged(tmp_path)
    assert [x['step'] for x in entries if 'weight' in x] == [2, 4, 6]
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Iter(train) [6/6]' in log
