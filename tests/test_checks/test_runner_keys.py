# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from torch.utils.data import DataLoader

from mlla_mm.checks.runner_keys import check_runner_keys

from ..bad_data import CLS, DET, SEG, assert_says, config

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

# What is changed, and what the error says.
ERRORS = [
    # Data loaders.
    (CLS, {'train_dataloader.batchsize': 4}, ['train_dataloader.batch_size meant']),
    (SEG, {'val_dataloader.num_workers': 0, 'val_dataloader.persistent_workers': True},
     ['val_dataloader.persistent_workers is True',
      '--cfg-options val_dataloader.num_workers=0 '
      'val_dataloader.persistent_workers=False']),
    (SEG, {'test_dataloader.num_workers': 0, 'test_dataloader.prefetch_factor': 2,
           'test_dataloader.persistent_workers': False},
     ['test_dataloader.prefetch_factor is 2', 'test_dataloader.prefetch_factor=None']),
    # Hooks.
    (SEG, {'default_hooks.checkpont.interval': 1},
     ['default_hooks.checkpont has no type', 'Is default_hooks.checkpoint meant']),
    (DET, {'default_hooks.checkpoint.intervall': 1},
     ['default_hooks.checkpoint.intervall', 'default_hooks.checkpoint.interval meant']),
    (SEG, {'custom_hooks': [dict(type='CheckpointHook', intervall=1)]},
     ['custom_hooks.0.intervall', 'custom_hooks.0.interval meant']),
    (SEG, {'custom_hooks': dict(type='EMAHook')}, ["[dict(type='EMAHook', ...)]"]),
    (SEG, {'custom_hooks': ['EMAHook']}, ["custom_hooks.0 is 'EMAHook'"]),
    (SEG, {'default_hooks': dict(mine=None)},
     ['default_hooks.mine is None', "mine=dict(type='NoHook')"]),
    # Dicts that become arguments of functions.
    (CLS, {'randomness.sed': 1}, ['Is randomness.seed meant']),
    (CLS, {'randomness': dict(deterministic=True)}, ['randomness has no seed']),
    (CLS, {'env_cfg.mp_cfg.start': 'fork'}, ['env_cfg.mp_cfg.start', 'mp_start_m']),
    (CLS, {'env_cfg.cudnn_benchmrk': True}, ['Is env_cfg.cudnn_benchmark meant']),
    (CLS, {'auto_scale_lr.base_batchsize': 1}, ['auto_scale_lr.base_batch_size meant']),
    # Loops.
    (CLS, {'test_cfg': dict(fp_16=True)}, ['test_cfg.fp_16', 'test_cfg.fp16 meant']),
    (SEG, {'train_cfg': dict(by_epoch=False, max_iter=2)}, ['train_cfg.max_iters m']),
    (SEG, {'train_cfg': dict(max_iters=2)}, ['train_cfg has no type']),
    (SEG, {'val_cfg': dict(dataloader=1)}, ['val_cfg.dataloader is not read']),
    (CLS, {'train_cfg.by_epoch': False}, ['type and by_epoch', '_delete_=']),
    # Numbers, and other kinds of values.
    (CLS, {'train_cfg.max_epochs': 'three'}, ["train_cfg.max_epochs is 'three'"]),
    (CLS, {'train_cfg.val_interval': 0}, ['train_cfg.val_interval is 0', '1 or more']),
    (DET, {'train_dataloader.batch_size': 0}, ['train_dataloader.batch_size is 0']),
    (DET, {'optim_wrapper.optimizer.lr': 'abc'}, ["optim_wrapper.optimizer.lr is 'a"]),
    (SEG, {'default_hooks.checkpoint.interval': 'two'}, ["interval is 'two'"]),
    (SEG, {'auto_scale_lr.base_batch_size': 'all'}, ["base_batch_size is 'all'"]),
    (SEG, {'log_level': 'DEBG'}, ["log_level is 'DEBG'", 'DEBUG']),
    (SEG, {'visualizer.vis_backends': 'TensorboardVisBackend'},
     ["vis_backends=[dict(type='TensorboardVisBackend')]"]),
    # The scope.
    (CLS, {'default_scope': None}, ["default_scope is None", "= 'mmpretrain'"]),
    (CLS, {'default_scope': 'mmdet'}, ["default_scope is 'mmdet'", "= 'mmpretrain'"]),
    (DET, {'default_scope': 'mlla_mm'}, ["'mlla_mm'", 'MaskRCNN', "= 'mmdet'"]),
    (SEG, {'default_scope': 'nobody'}, ["'nobody'", "default_scope = 'mmseg'"]),
]  # fmt: skip


@pytest.mark.parametrize('scope, changes, words', ERRORS)
def test_mistakes(scope, changes, words):
    cfg = config(scope)
    for key, value in changes.items():
        if value is None or isinstance(value, (dict, list)):
            cfg[key] = value  # replaces, where merge_from_dict merges
        else:
            cfg.merge_from_dict({key: value})
    with pytest.raises(ValueError) as caught:
        check_runner_keys(cfg)
    assert_says(caught.value, *words)
    assert '\n' not in str(caught.value)


def test_only_what_is_read_is_checked():
    cfg = config(SEG)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=True)
    check_runner_keys(cfg, ('train', 'val'))
    with pytest.raises(ValueError, match='test_dataloader'):
        check_runner_keys(cfg, ('test',))


@pytest.mark.parametrize('key', ['persistent_workers', 'prefetch_factor'])
def test_pytorch_refuses_what_is_refused(key):
    with pytest.raises(ValueError):
        DataLoader([1], num_workers=0, **{key: 2})


@pytest.mark.parametrize('scope', [CLS, DET, SEG])
def test_what_is_right(scope):
    cfg = config(scope)
    cfg.train_dataloader.update(num_batch_per_epoch=3, pin_memory=True)
    cfg.default_hooks.checkpoint.update(save_optimizer=False, backend_args=None)
    cfg.default_hooks.logger = None
    cfg.val_cfg = dict(fp16=True, _scope_=scope)
    cfg.model = dict(type='TTAModel', module=cfg.model)
    check_runner_keys(cfg)
    cfg.runner_type = 'MyRunner'  # which may read anything
    cfg.train_dataloader.anything = 1
    check_runner_keys(cfg)


@HOOKS.register_module()
class SaveElsewhere(CheckpointHook):
    def __init__(self, *args, **kwargs):
        self.elsewhere = kwargs.pop('elsewhere')
        super().__init__(*args, **kwargs)


def test_what_a_users_own_classes_read():
    cfg = config(SEG)
    cfg.default_hooks.checkpoint = dict(type='SaveElsewhere', elsewhere='s3')
    check_runner_keys(cfg)
    cfg.runner_type = 'MyRunner'  # it may take any hooks
    cfg.default_hooks.mine = None
    cfg.custom_hooks = dict(mine=dict(type='EMAHook'))
    check_runner_keys(cfg)


def test_a_flexible_runner_draws_a_seed():
    cfg = config(CLS)
    cfg.randomness = dict(deterministic=False)
    cfg.runner_type = 'FlexibleRunner'
    check_runner_keys(cfg)


def test_a_scope_in_every_type_needs_no_default():
    cfg = Config(
        dict(
            model=dict(
                type='mmpretrain.ImageClassifier',
                backbone=dict(type='MLLA'),
                head=dict(type='mmpretrain.LinearClsHead'),
            )
        )
    )
    check_runner_keys(cfg)
