# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from benchmarks.peak_memory import largest_size, synthetic_batch
from mlla_mm.checks import config as checks
from mlla_mm.checks.config import check_config, check_loop, make_work_dir
from mlla_mm.engine.parts import SPLITS

from ..bad_data import CLS, DET, SEG, assert_says, config
from ..nano import CONFIGS

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

# What is changed, and what the error says.
CONFIG_ERRORS = [
    # Numbers of classes.
    (DET, {'model.roi_head.bbox_head.num_classes': 80},
     ['model.roi_head.bbox_head.num_classes is 80', 'train_dataloader has 10 classes',
      'metainfo.classes']),
    (DET, {'model.roi_head.mask_head.num_classes': 11},
     ['model.roi_head.mask_head.num_classes is 11', 'train_dataloader has 10 classes']),
    (SEG, {'model.auxiliary_head.num_classes': 150},
     ['model.auxiliary_head.num_classes is 150', 'train_dataloader has 11 classes',
      'background']),
    (CLS, {'model.data_preprocessor.num_classes': 1000},
     ['model.data_preprocessor.num_classes is 1000', '10 classes']),
    (SEG, {'val_dataloader.dataset.metainfo': dict(classes=('ground', 'digit'))},
     ['model.decode_head.num_classes is 11', 'val_dataloader has 2 classes',
      'ground, digit']),
    # Channels and outputs.
    (DET, {'model.neck.in_channels': [96, 192, 384, 768]},
     ['model.neck.in_channels is [96, 192, 384, 768]', '[32, 64, 128, 256]',
      'embed_dims 32']),
    (DET, {'model.backbone.out_indices': (1, 2, 3)},
     ['model.neck.in_channels is [32, 64, 128, 256]', '[64, 128, 256]',
      'out_indices (1, 2, 3)']),
    (DET, {'model.rpn_head.in_channels': 256},
     ['model.rpn_head.in_channels is 256', '64 channels', "FPN's out_channels"]),
    (SEG, {'model.decode_head.in_channels': [64, 128, 256, 512]},
     ['model.decode_head.in_channels is [64, 128, 256, 512]', '[32, 64, 128, 256]']),
    (SEG, {'model.backbone.out_indices': (0, 1), 'model.decode_head.in_index': [0, 2]},
     ['model.decode_head.in_index is [0, 2]', '2 maps', 'out_indices (0, 1)']),
    (CLS, {'model.backbone.out_indices': (2,)},
     ['model.head.in_channels is 256', '128 channels', 'out_indices (2,)']),
    # Arguments of the backbone.
    (DET, {'model.backbone.drop_path': 0.1},
     ['model.backbone.drop_path: MLLA takes no', 'drop_path_rate meant']),
    (DET, {'model.backbone.out_indices': (1, 2, 3, 4)},
     ['model.backbone', 'between 0 and 3', 'got (1, 2, 3, 4)']),
    (DET, {'model.backbone.drop_path_rate': -0.1},
     ['model.backbone', 'at least 0 and below 1', 'got -0.1']),
    (DET, {'model.backbone.arch.num_heads': (3, 2, 4, 8)},
     ['model.backbone', 'num_heads[0] = 3', '32 channels']),
    # Hooks, and types that MMEngine does not name.
    (SEG, {'runner_type': 'MyRunner'}, ["runner_type is 'MyRunner'", 'custom_imports']),
    (CLS, {'optim_wrapper.optimizer.type': 'AdamWW'},
     ["optim_wrapper.optimizer.type is 'AdamWW'", 'custom_imports']),
    (SEG, {'default_hooks.invalid_loss': None},
     ['default_hooks.invalid_loss is None', "dict(type='NoHook')"]),
]  # fmt: skip


@pytest.mark.parametrize('scope, changes, words', CONFIG_ERRORS)
def test_configs(scope, changes, words):
    cfg = config(scope)
    cfg.merge_from_dict(changes)
    with pytest.raises(ValueError) as caught:
        check_config(cfg)
    assert_says(caught.value, *words)


MMENGINES_LOOP = dict(type='IterBasedTrainLoop', max_iters=5, _delete_=True)
LOOP_ERRORS = [
    ({'skip_corrupt_images': True}, ['train_cfg = dict(skip_corrupt_images=True)']),
    ({'train_cfg': dict(MMENGINES_LOOP, skip_corrupt_images=True)},
     ['train_cfg.skip_corrupt_images', "dict(type='SeededIterBasedTrainLoop')"]),
    ({'train_cfg': dict(MMENGINES_LOOP, micro_batches=2)},
     ['train_cfg.micro_batches', "dict(type='SeededIterBasedTrainLoop')"]),
    ({'train_cfg': dict(MMENGINES_LOOP, running_statistics='first')},
     ['train_cfg.running_statistics', "dict(type='SeededIterBasedTrainLoop')"]),
    ({'train_dataloader.sampler': dict(type='SharedSampler', micro_batches=1)},
     ['0.1', 'the config that the run started from']),
]  # fmt: skip


@pytest.mark.parametrize('changes, words', LOOP_ERRORS)
def test_what_a_loop_does_not_do(changes, words):
    cfg = config(SEG)
    cfg.merge_from_dict(changes)
    with pytest.raises(ValueError) as caught:
        check_loop(cfg)
    assert_says(caught.value, *words)
    check_config(cfg)  # it can be tested


@pytest.mark.parametrize('changes', [{}, {'train_cfg': MMENGINES_LOOP}])
def test_what_loops_do(changes):
    cfg = config(SEG)
    cfg.merge_from_dict(changes)
    check_loop(cfg)


def test_erasing_needs_the_preprocessor_that_erases():
    cfg = Config.fromfile(CONFIGS / 'classification/mlla-t_8xb128_in1k.py')
    cfg.optim_wrapper.type = 'OptimWrapper'  # the other needs a GPU
    check_loop(cfg)
    for kind in ('ClsDataPreprocessor', None):
        cfg.model.data_preprocessor.type = kind
        with pytest.raises(ValueError) as caught:
            check_loop(cfg)
        assert_says(caught.value, 'DrawErasing', kind or 'default', 'does not erase')
    cfg.train_dataloader.dataset.pipeline.pop()
    check_loop(cfg)


# What is changed in a config that is to be deterministic, and what the error says.
DETERMINISTIC = {
    'detection': (DET, {}, ['RoIAlign']),
    'detection, by torchvision in Python': (
        DET,
        {
            f'model.roi_head.{part}_roi_extractor.roi_layer.use_torchvision': True
            for part in ('bbox', 'mask')
        },
        [],
    ),
    'segmentation': (SEG, {}, ['UPerHead', 'AdaptiveAvgPool2d', 'torch.histc']),
    'segmentation, means alone': (
        SEG, {'model.decode_head.pool_scales': (1,)}, ['torch.histc'],
    ),
    'segmentation, not evaluated': (
        SEG, {'model.decode_head.pool_scales': (1,), 'val_cfg': None}, [],
    ),
    # MMEngine says that it is missing.
    'segmentation, without a metric': (
        SEG, {'model.decode_head.pool_scales': (1,), 'val_evaluator': None}, [],
    ),
    'classification': (CLS, {}, []),
}  # fmt: skip


def deterministic(monkeypatch, case):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(checks, 'is_stand_in', lambda: True)
    scope, changes, words = DETERMINISTIC[case]
    cfg = config(scope)
    cfg.merge_from_dict({'randomness.deterministic': True, **changes})
    if not cfg.get('val_evaluator'):
        cfg.pop('val_evaluator')
    return cfg, words


@pytest.mark.parametrize('case', DETERMINISTIC)
def test_deterministic_runs(monkeypatch, case):
    cfg, words = deterministic(monkeypatch, case)
    if not words:
        return check_loop(cfg)
    with pytest.raises(ValueError) as caught:
        check_loop(cfg)
    assert_says(caught.value, *words, 'randomness.deterministic=False')
    others = {'RoIAlign', 'AdaptiveAvgPool2d', 'torch.histc'} - {*words}
    assert not [word for word in others if word in str(caught.value)]
    cfg.randomness.deterministic = False
    check_loop(cfg)
    cfg.randomness.deterministic = True
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    check_loop(cfg)


def test_compiled_roi_align_is_not_refused(monkeypatch):
    """PyTorch does not know what it does."""
    cfg, _ = deterministic(monkeypatch, 'detection')
    monkeypatch.setattr(checks, 'is_stand_in', lambda: False)
    check_loop(cfg)


# Nodes of gradients that the documentation of torch.use_deterministic_algorithms lists
# for CUDA, in PyTorch 2.1 or newer, and RoIAlign. It lists bilinear upsampling too, but
# torch.nn.functional.interpolate replaces it. NLLLoss2D is deterministic without a sum.
REFUSED = (
    'AdaptiveAvgPool AdaptiveMaxPool AvgPool3D MaxPool3D FractionalMaxPool MaxUnpool '
    'UpsampleLinear UpsampleBicubic UpsampleTrilinear Reflection Replication Put '
    'CtcLoss EmbeddingBag Median Kthvalue GridSampler Cumsum ScatterReduce RoIAlign'
).split()


@pytest.mark.parametrize(
    'case',
    ['detection', 'segmentation', 'segmentation, not evaluated', 'classification'],
)
def test_what_gradients_pass_through(monkeypatch, case):
    """The check knows every refused node of a training step's graph."""
    cfg, words = deterministic(monkeypatch, case)
    monkeypatch.undo()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).train()
        # Images that need no padding: mmseg 1.2 cannot weight ignored pixels.
        batch = synthetic_batch(cfg, 2, largest_size(cfg))
        batch = model.data_preprocessor(batch, True)
        losses = model(**batch, mode='loss')
    loss, _ = model.parse_losses(losses)
    todo, nodes = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node not in nodes:
            nodes.add(node)
            todo += [after for after, _ in node.next_functions if after]
    names = {type(node).__name__ for node in nodes}
    refused = {x for x in REFUSED if any(name.startswith(x) for name in names)}
    known = {'RoIAlign': 'RoIAlign', 'AdaptiveAvgPool': 'AdaptiveAvgPool2d'}
    assert {known[x] for x in refused} == {*words} - {'UPerHead', 'torch.histc'}
    assert len(names) > 10


def test_hooks_are_switched_off(tmp_path):
    """None switches off hooks of MMEngine, and NoHook any hook. The others stay."""
    cfg = config(SEG)
    left = set(cfg.default_hooks) - {'timer', 'preemption', 'checkpoint'}
    # Merged as by an inheriting config, which keeps the other arguments.
    off = dict(type='NoHook')
    hooks = dict(timer=None, preemption=off, checkpoint=off)
    cfg = Config(Config._merge_a_into_b(dict(default_hooks=hooks), cfg.to_dict()))
    assert cfg.default_hooks.checkpoint.interval
    check_config(cfg)
    runner = Runner(
        torch.nn.Identity(),
        str(tmp_path),
        default_hooks=cfg.default_hooks,
        default_scope='mmseg',
        experiment_name=tmp_path.name,
    )
    kinds = {type(hook).__name__ for hook in runner.hooks}
    assert {cfg.default_hooks[name].type for name in left} <= kinds
    assert not kinds & {'IterTimerHook', 'PreemptionHook', 'WholeCheckpointHook'}


@pytest.mark.parametrize(
    'path',
    [path for path in sorted(CONFIGS.rglob('*.py')) if '_base_' not in path.parts],
    ids=lambda path: path.stem,
)
def test_our_configs_are_right(path):
    check_config(Config.fromfile(path))


def test_what_is_not_known_is_left_alone():
    cfg = config(DET)
    cfg.merge_from_dict(
        {
            'model.backbone': dict(
                _delete_=True, type='ResNet', depth=50, anything='goes'
            ),
            'train_dataloader.dataset.pipeline.2': dict(
                type='Albu', transforms=[dict(type='RandomCrops')]
            ),
            'model.test_cfg.rcnn.nms.type': 'soft_nms',
            'model.mine': dict(type='SomethingOfMine'),
        }
    )
    check_config(cfg)


def test_only_the_data_of_the_run_count():
    cfg = config(DET)
    cfg.test_dataloader.dataset.metainfo = dict(classes=('cat', 'dog'))
    check_config(cfg, ('train', 'val'))
    for splits in (('test',), ('train', 'val', 'test')):
        with pytest.raises(ValueError, match='data set of test_dataloader has 2'):
            check_config(cfg, splits)


def test_one_channel_tells_two_classes_of_pixels_apart():
    cfg = config(SEG)
    heads = [cfg.model.decode_head, cfg.model.auxiliary_head]
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('no', 'yes'))
    for head in heads:
        head.num_classes = 1
    check_config(cfg)
    heads[0].num_classes = 3
    with pytest.raises(ValueError, match='decode_head.num_classes is 3'):
        check_config(cfg)


def test_a_classifier_can_be_evaluated_on_some_of_its_classes():
    cfg = config(CLS)
    cfg.model.head.num_classes = cfg.model.data_preprocessor.num_classes = 20
    with pytest.raises(ValueError, match='num_classes is 20, .* train_dataloader'):
        check_config(cfg)
    cfg.train_dataloader.dataset = dict(type='CustomDataset')  # of 20 classes
    check_config(cfg)
    cfg.model.head.num_classes = 5
    with pytest.raises(ValueError, match='num_classes is 5, .* val_dataloader'):
        check_config(cfg)


@pytest.mark.parametrize('kind', ['link', 'pipe', 'folder'])
def test_the_copy_of_the_config_goes_nowhere_else(tmp_path, kind):
    """MMEngine would write through a link that somebody left in the folder."""
    work_dir, outside = tmp_path / 'work', tmp_path / 'outside'
    (tmp_path / 'x.py').write_text(f'work_dir = {str(work_dir)!r}')
    cfg = Config.fromfile(tmp_path / 'x.py')
    make_work_dir(cfg)
    (work_dir / 'x.py').write_text('of a run before')
    make_work_dir(cfg)
    (work_dir / 'x.py').unlink()
    if kind == 'link':
        (work_dir / 'x.py').symlink_to(outside)
    else:
        (os.mkfifo if kind == 'pipe' else os.mkdir)(work_dir / 'x.py')
    with pytest.raises(ValueError, match='work/x.py is a .*--work-dir'):
        make_work_dir(cfg)
    assert not outside.exists()


def test_mixed_precision_without_a_gpu(monkeypatch):
    monkeypatch.setattr(checks, 'get_device', lambda: 'cpu')
    cfg = config(CLS)
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    with pytest.raises(ValueError, match='AmpOptimWrapper.*_delete_=True'):
        check_loop(cfg)


def test_an_initialization_without_a_type():
    cfg = config(CLS)
    cfg.model.backbone.init_cfg = dict(checkpoint='x.pth')
    with pytest.raises(ValueError, match='model.backbone.init_cfg.type=Pretrained'):
        check_config(cfg)
