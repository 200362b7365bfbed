# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import inspect
import re

import pytest
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner

from mlla_mm.engine.config_files import merge_options
from mlla_mm.engine.option_keys import READ, describe_old_keys, describe_unused

from ..bad_data import assert_says
from ..nano import NANO


@pytest.fixture(scope='module')
def segmentor():
    return Config.fromfile(NANO['mmseg'])


# An option, and what the error says.
UNREAD = [
    ('optimizer.lr', ['nothing reads optimizer', 'optim_wrapper.optimizer.lr=1']),
    ('data.samples_per_gpu', ['train_dataloader.batch_size=1']),
    ('data.val.data_root', ['val_dataloader.dataset.data_root=1']),
    ('trian_cfg.max_iters', ['train_cfg.max_iters=1']),
    ('total_epochs', ['train_cfg.max_epochs=1']),
    ('evaluation.interval', ['train_cfg.val_interval=1']),
    ('checkpoint_config.interval', ['default_hooks.checkpoint.interval=1']),
    ('lr', ['optim_wrapper.optimizer.lr=1']),
    ('batch_size', ['train_dataloader.batch_size=1', 'val_dataloader.batch_size=1']),
    ('log_interval', ['default_hooks.logger.interval=1']),
    ('bach_size', ['train_dataloader.batch_size=1']),
    ('num_classes', ['model.decode_head.num_classes=1', 'model.auxiliary_head']),
    ('backbone.with_cp', ['model.backbone.with_cp=1']),
    ('seed', ['randomness.seed=1']),
    ('launcher', ['--launcher']),
    ('resume_from', ['--resume PATH']),
    ('compil', ['Is compile=1 meant']),
    ('type', ['model.type=1', ' more meant']),
    ('xyzzy', ['nothing reads xyzzy', 'train_dataloader']),
    # Variables of the file.
    ('max_iters', ['variable of the config file', 'Set train_cfg.max_iters=1']),
    ('data_root', ['train_dataloader.dataset.data_root=1', 'test_dataloader']),
    ('train_pipeline.0.type', ['Set train_dataloader.dataset.pipeline.0.type=1']),
    # What has no such keys.
    ('param_scheduler.2.gamma', ['param_scheduler is a list of 2', 'no 2']),
    ('param_scheduler.0', ['Set param_scheduler as a whole']),
    ('log_level.x', ["log_level is INFO", 'log_level._delete_=True']),
    ('optim_wrapper.optimizer.betas.0', ['betas is (0.9, 0.95)', 'as a whole']),
]  # fmt: skip


@pytest.mark.parametrize('key, words', UNREAD)
def test_options_that_change_nothing(segmentor, key, words):
    cfg = copy.deepcopy(segmentor)
    with pytest.raises(ValueError) as caught:
        merge_options(cfg, {key: 1})
    assert_says(caught.value, f'--cfg-options {key}', *words)
    assert '\n' not in str(caught.value)
    assert cfg.to_dict() == segmentor.to_dict()


ALLOWED = [
    {'model.backbone.with_cp': True},
    {'optim_wrapper.accumulative_counts': 4},
    {'param_scheduler.0.start_factor': 0.5},
    {'custom_hooks': [dict(type='EMAHook')]},
    {'compile': True},
    {'strategy.type': 'FSDPStrategy'},
    {'allow_empty_classes': True},
    {'log_level._delete_': True, 'log_level.x': 1},
    # Together they say what the file would have said.
    {'max_iters': 3, 'train_cfg.max_iters': 3},
    # Nobody knows who reads the user's own.
    {'mine': 2},
]  # fmt: skip


@pytest.mark.parametrize('options', ALLOWED)
def test_options_that_may_be_read(segmentor, options):
    cfg = copy.deepcopy(segmentor)
    cfg.mine = 1
    expected = copy.deepcopy(cfg)
    expected.merge_from_dict(options)
    merge_options(cfg, options)
    assert cfg.to_dict() == expected.to_dict()


def test_a_variable_of_another_value_may_be_read(segmentor):
    cfg = copy.deepcopy(segmentor)
    cfg.max_iters = 7  # the loop has another number
    merge_options(cfg, {'max_iters': 8})
    assert cfg.max_iters == 8


def test_a_runner_of_somebody_may_read_any_key():
    cfg = Config(dict(runner_type='MyRunner'))
    merge_options(cfg, {'anything': 1})
    assert cfg.anything == 1


def test_what_mmengine_reads_is_known():
    """FlexibleRunner has the arguments of Runner and some more."""
    parameters = set(inspect.signature(FlexibleRunner).parameters) - {'cfg'}
    # A user of FlexibleRunner gives it these in code alone.
    assert parameters - READ <= {'extra_modules'}
    own = re.findall(r"self\.cfg\.get\('(\w+)'", inspect.getsource(Runner))
    assert own and READ.issuperset(own)


def old_keys(tmp_path, text):
    path = tmp_path / 'a.py'
    path.write_text(text)
    return describe_old_keys(Config.fromfile(path))


def test_names_of_the_generation_before(tmp_path):
    text = old_keys(tmp_path, 'data = dict(samples_per_gpu=2)\ntotal_epochs = 3\n')
    assert_says(text, 'data (now train_dataloader', 'total_epochs (now train_cfg.max_e')
    assert '\n' not in text


@pytest.mark.parametrize(
    'text',
    [
        # mmseg's schedules.
        "optimizer = dict(type='SGD', lr=1)\noptim_wrapper = dict(optimizer=optimizer)",
        'total_epochs = 3\ntrain_cfg = dict(max_epochs=total_epochs)',
        "data_root = 'x'\ndataset_type = 'CocoDataset'\nseed = 3",
        "runner = 1\nrunner_type = 'MyRunner'",
    ],
)
def test_variables_that_look_old(tmp_path, text):
    assert old_keys(tmp_path, text) is None


def test_variables_that_look_old_in_a_base(tmp_path):
    (tmp_path / 'base.py').write_text('total_epochs = 3')
    text = "_base_ = 'base.py'\ntrain_cfg = dict(max_epochs={{_base_.total_epochs}})"
    assert old_keys(tmp_path, text) is None
    assert 'total_epochs' in old_keys(tmp_path, "_base_ = 'base.py'")


def test_a_config_without_text_has_its_values():
    sgd = dict(type='SGD', lr=1)
    cfg = Config(dict(optimizer=sgd, optim_wrapper=dict(optimizer=dict(sgd))))
    assert describe_old_keys(cfg) is None
    cfg.optimizer = dict(sgd, lr=2)
    assert 'optimizer (now' in describe_old_keys(cfg)


BASE = """
max_epochs = 12
train_pipeline = [dict(type='Resize')]
custom_hooks = [dict(type='EMAHook')]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
"""


def unused(tmp_path, text):
    (tmp_path / 'base.py').write_text(BASE)
    path = tmp_path / 'own.py'
    path.write_text(f"_base_ = ['base.py']\n{text}")
    return describe_unused(Config.fromfile(path))


@pytest.mark.parametrize(
    'text, words',
    [
        ('train_dataloder = dict(x=4)', ['train_dataloder,', 'Set train_dataloader ']),
        ('custom_hook = []', ['custom_hook,', 'Set custom_hooks ']),
        ('max_epochs = 24', ['max_epochs,', 'Set train_cfg.max_epochs ']),
        ('batch_size = 4', ['batch_size,', 'train_dataloader.batch_size']),
        ('seed = 3', ['seed,', 'randomness.seed']),
    ],
)
def test_names_of_a_file_to_no_effect(tmp_path, text, words):
    (line,) = unused(tmp_path, text)
    assert_says(line, 'own.py', *words)


@pytest.mark.parametrize(
    'text',
    [
        'max_epochs = 12',
        'max_epochs = 24\ntrain_cfg = dict(max_epochs=max_epochs)',
        'test_pipeline = []\nmy_classes = 4\nauto_scale_lr = dict(base_batch_size=8)',
    ],
)
def test_names_of_a_file_that_are_right(tmp_path, text):
    assert unused(tmp_path, text) == []
