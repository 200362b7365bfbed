# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    MODELS,
    PARAM_SCHEDULERS,
    init_default_scope,
)
from torch import nn

from mlla_mm.datasets import digits
from mlla_mm.engine import options
from mlla_mm.engine.parts import kind_of, replace_sync_bn

from .. import reference

CONFIGS = Path(__file__).parents[2] / 'configs' / 'segmentation'
RECIPE = 'upernet_mlla-{}_8xb2-160k_ade20k-512x512'
NANO = 'upernet_mlla-nano_digits'
SLIDE = RECIPE.format('b') + '_slide'
HEAD_SWAP = 'segformer-head_mlla-t_8xb2-160k_ade20k-512x512'
mmseg = pytest.importorskip('mmseg')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def installed(path: str) -> Config:
    """A config of mmseg's own."""
    config = Path(mmseg.__file__).parent / '.mim' / 'configs' / path
    if not config.is_file():
        pytest.skip('mmseg is installed without its configs')
    return Config.fromfile(config)


@pytest.fixture(scope='module')
def digits_ade20k(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'digits_ade20k'
    return digits.make_ade20k(out, train=16, val=5, size=64)


@pytest.fixture
def sample(tmp_path) -> dict:
    """A picture of ADE20K's usual size, right half white, and its labels 0 to 3."""
    image = np.zeros((480, 640, 3), np.uint8)
    image[:, 320:] = 255  # a flip shows
    labels = np.repeat(np.arange(4, dtype=np.uint8), 160)[None].repeat(480, axis=0)
    paths = [str(tmp_path / name) for name in ('image.png', 'labels.png')]
    for path, content in zip(paths, (image, labels)):
        cv2.imwrite(path, content)
    return dict(
        img_path=paths[0],
        seg_map_path=paths[1],
        reduce_zero_label=True,
        label_map=None,
        seg_fields=[],
    )


@pytest.mark.parametrize(
    'size, parameters, drop_path_rate',
    [('t', 54_187_724, 0.3), ('s', 72_810_572, 0.3), ('b', 127_637_468, 0.5)],
)
def test_model_of_the_recipe(size, parameters, drop_path_rate):
    cfg = read(RECIPE.format(size))
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    # BatchNorm is neither frozen nor held in evaluation mode.
    assert all(p.requires_grad for p in model.parameters())
    last_block = model.backbone.layers[-1].blocks[-1]
    assert last_block.drop_path.drop_prob == pytest.approx(drop_path_rate)
    assert cfg.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'data/MLLA_{size.upper()}.pth'
    )
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.val_dataloader.batch_size == cfg.test_dataloader.batch_size == 1
    assert cfg.model.test_cfg.mode == 'whole'


@pytest.mark.parametrize('size, channels', [('t', 64), ('s', 64), ('b', 96)])
def test_heads_are_mmsegs(size, channels):
    """Losses, dropout, norms and the way to test."""
    ours = read(RECIPE.format(size)).model
    theirs = installed('_base_/models/upernet_r50.py').model
    assert ours.data_preprocessor.pop('size') == (512, 512)
    theirs.pop('pretrained')
    theirs.backbone = ours.backbone
    theirs.decode_head.in_channels = [channels * 2**i for i in range(4)]
    theirs.auxiliary_head.in_channels = channels * 4
    for head in (theirs.decode_head, theirs.auxiliary_head):
        head.num_classes = 150
    assert ours.to_dict() == theirs.to_dict()


def test_metric_is_mmsegs():
    ours = read(RECIPE.format('t'))
    theirs = installed('_base_/datasets/ade20k.py')
    for key in ('val_evaluator', 'test_evaluator'):
        assert ours[key] == theirs[key]


def batch_norms(model: nn.Module) -> list:
    return [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


def test_synchronised_on_gpus_only():
    cfg = read(RECIPE.format('t'))
    for key in ('decode_head', 'auxiliary_head'):
        norms = batch_norms(MODELS.build(cfg.model[key]))
        assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)

    nano = read(NANO).model
    for model_cfg in (cfg.model, nano):
        replace_sync_bn(model_cfg)
        model = MODELS.build(model_cfg)
        assert all(type(norm) is nn.BatchNorm2d for norm in batch_norms(model))
    model.train()(torch.rand(2, 3, 64, 64))  # runs on the CPU


def test_optimizer_groups():
    cfg = read(RECIPE.format('t'))
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper).__name__ == 'OptimWrapper'  # float32, no clipping
    assert not wrapper.clip_grad_kwargs
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in wrapper.optimizer.param_groups:
        assert group['lr'] == 6e-5
        assert group['betas'] == (0.9, 0.999)
        for p in group['params']:
            parameter = names[id(p)]
            seen.add(parameter)
            expected = 0.0 if 'norm' in parameter else 0.01
            assert group['weight_decay'] == expected, parameter
    assert seen == set(names.values())
    # The recipe's exception goes by the name: the heads' norm layers do decay.
    assert {'backbone.norm0.weight', 'decode_head.bottleneck.bn.weight'} <= seen


def test_learning_rate():
    cfg = read(RECIPE.format('b'))
    with open(reference.DATA / 'ade20k_learning_rate.csv') as file:
        expected = {
            int(row['iteration']): float(row['learning_rate'])
            for row in csv.DictReader(file)
        }
    lr = cfg.optim_wrapper.optimizer.lr
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer))
        for scheduler in cfg.param_scheduler
    ]
    for iteration in range(cfg.train_cfg.max_iters):
        if iteration in expected:
            rate = optimizer.param_groups[0]['lr']
            assert rate == pytest.approx(expected.pop(iteration), rel=1e-6), iteration
        for scheduler in schedulers:
            scheduler.step()
    assert not expected


def test_train_pipeline(sample):
    np.random.seed(0)
    cfg = read(RECIPE.format('t'))
    pipeline = Compose(cfg.train_dataloader.dataset.pipeline)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    runs = [pipeline(dict(sample)) for _ in range(60)]
    metas = [run['data_samples'].metainfo for run in runs]

    # 480 rows go to 256 at least and 1024 at most, before the crop.
    factors = [meta['scale_factor'][1] * 480 / 512 for meta in metas]
    assert 0.5 <= min(factors) < 0.7 and 1.8 < max(factors) <= 2
    assert max(max(meta['img_shape']) for meta in metas) == 512
    assert 0.3 < np.mean([meta['flip'] for meta in metas]) < 0.7
    assert len({run['inputs'].float().mean().item() for run in runs}) == len(runs)

    smallest = min(runs, key=lambda run: run['inputs'].shape[1])
    height, width = smallest['inputs'].shape[1:]
    assert height < 512
    batch = preprocessor(
        dict(inputs=[smallest['inputs']], data_samples=[smallest['data_samples']]),
        training=True,
    )
    labels = batch['data_samples'][0].gt_sem_seg.data
    assert batch['inputs'].shape == (1, 3, 512, 512)
    assert labels.shape == (1, 512, 512)
    assert (batch['inputs'][..., height:, :] == 0).all()
    assert (labels[:, height:] == 255).all()
    # Label 0 of the file is unlabelled, 1 to 3 are the first three classes.
    assert set(labels[:, :height, :width].unique().tolist()) <= {0, 1, 2, 255}


def test_transforms_of_the_train_pipeline():
    pipeline = read(RECIPE.format('t')).train_dataloader.dataset.pipeline
    steps = {kind_of(step): step for step in pipeline}
    assert list(steps) == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'RandomResize',
        'RandomCrop',
        'RandomFlip',
        'PhotoMetricDistortion',
        'PackSegInputs',
    ]
    assert steps['RandomCrop']['cat_max_ratio'] == 0.75


def test_test_pipeline_and_normalisation(sample):
    cfg = read(RECIPE.format('t'))
    data = Compose(cfg.test_dataloader.dataset.pipeline)(sample)
    meta = data['data_samples'].metainfo
    assert meta['img_shape'] == (512, 683)
    # The metric compares at the original size, with unlabelled pixels ignored.
    labels = data['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, 480, 640)
    assert labels[0, 0, ::160].tolist() == [255, 0, 1, 2]

    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    blue = torch.zeros_like(data['inputs'])
    blue[0] = 255  # images are read as BGR
    batch = preprocessor(dict(inputs=[blue], data_samples=[data['data_samples']]))
    assert batch['inputs'].shape == (1, 3, 512, 683)  # whole, without padding
    expected = [-123.675 / 58.395, -116.28 / 57.12, (255 - 103.53) / 57.375]
    assert batch['inputs'][0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_sizes_of_test_time_augmentation(sample):
    cfg = read(RECIPE.format('b'))
    data = Compose(cfg.tta_pipeline)(sample)
    sizes = [tuple(image.shape[1:]) for image in data['inputs']]
    # 480 x 640 within (int(2048 r), int(512 r)): the short side is int(512 r).
    short_sides = [256, 384, 512, 640, 768, 896]
    expected = [(side, int(side * 640 / 480 + 0.5)) for side in short_sides]
    assert sorted(sizes) == sorted(expected * 2)
    flips = [meta.get('flip', False) for meta in data['data_samples']]
    assert flips == [False, True] * 6
    for image, flip in zip(data['inputs'], flips):
        assert (image[0, 5, 5] > image[0, 5, -5]) == flip
    assert cfg.tta_model.type == 'SegTTAModel'


def test_long_side_of_test_time_augmentation(sample):
    """A panorama is held by the long side: int(2048 r)."""
    cv2.imwrite(sample['img_path'], np.zeros((60, 600, 3), np.uint8))
    data = Compose(read(RECIPE.format('b')).tta_pipeline)(sample)
    long_sides = {image.shape[2] for image in data['inputs']}
    assert long_sides == {1024, 1536, 2048, 2560, 3072, 3584}


@pytest.mark.parametrize('split', ['train', 'val'])
def test_digits_labels(digits_ade20k, split):
    """A label as the dataset gives it is the index of the digit's class."""
    dataset_cfg = read(NANO)[f'{split}_dataloader'].dataset
    dataset_cfg.data_root = str(digits_ade20k)
    dataset_cfg.pipeline = [dict(type='LoadAnnotations')]
    dataset = DATASETS.build(dataset_cfg)
    assert dataset.metainfo['classes'] == digits.SEG_CLASSES
    assert [tuple(c) for c in dataset.metainfo['palette']] == digits.SEG_PALETTE
    assert len(dataset) == dict(train=16, val=5)[split]
    for item in dataset:
        stored = cv2.imread(item['seg_map_path'], cv2.IMREAD_UNCHANGED)
        assert (item['gt_seg_map'] == stored - 1).all()
        assert item['gt_seg_map'].max() <= 10


def test_head_swap_example():
    lines = (CONFIGS / f'{HEAD_SWAP}.py').read_text().splitlines()
    assert len(lines) < 15
    cfg, base = read(HEAD_SWAP), read(RECIPE.format('t'))
    for key in ('train_dataloader', 'param_scheduler', 'optim_wrapper'):
        assert cfg[key] == base[key]
    cfg.model.backbone.init_cfg = None
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model).eval()
    assert type(model.decode_head).__name__ == 'SegformerHead'
    assert not model.with_auxiliary_head
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96)).shape == (1, 150, 16, 24)


def nano_with_test_cfg(test_cfg: dict) -> nn.Module:
    cfg = read(NANO).model
    cfg.test_cfg = test_cfg
    replace_sync_bn(cfg)
    torch.manual_seed(0)
    return MODELS.build(cfg).eval()


def test_sliding_window_example():
    test_cfg = read(SLIDE).model.test_cfg
    assert test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    slide = nano_with_test_cfg(test_cfg)
    whole = nano_with_test_cfg(dict(mode='whole'))
    image = torch.rand(1, 3, 512, 600)
    meta = [dict(ori_shape=(512, 600), img_shape=(512, 600))]
    with torch.no_grad():
        found = slide.inference(image, meta)
        # Two windows; where both see a pixel, their mean counts.
        left, right = (whole.inference(image[..., w], meta)
                       for w in (slice(0, 512), slice(88, 600)))  # fmt: skip
    expected = torch.cat(
        [left[..., :88], (left[..., 88:] + right[..., :424]) / 2, right[..., 424:]], -1
    )
    assert found.shape == (1, 11, 512, 600)
    torch.testing.assert_close(found, expected)


def digits_options(data_root: Path) -> dict:
    """The demo on a small data set, two iterations."""
    cfg_options = {
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'default_hooks.logger.interval': 1,
        'default_hooks.checkpoint.interval': 2,
    }
    for split in ('train', 'val', 'test'):
        cfg_options[f'{split}_dataloader.dataset.data_root'] = str(data_root)
        cfg_options[f'{split}_dataloader.num_workers'] = 0
        cfg_options[f'{split}_dataloader.persistent_workers'] = False
    return cfg_options


def metrics(work_dir: Path) -> dict:
    return json.loads(sorted(work_dir.glob('*/*.json'))[-1].read_text())


@pytest.mark.slow
def test_two_processes(run_tool, digits_ade20k, tmp_path):
    """Training, evaluation and multi-scale evaluation through the launch scripts."""
    config = CONFIGS / f'{NANO}.py'
    overrides = [f'{k}={v}' for k, v in digits_options(digits_ade20k).items()]
    result = run_tool(
        'bash', 'tools/dist_train.sh', config, 2, '--work-dir', tmp_path, '--seed', 0,
        '--cfg-options', *overrides,
    )  # fmt: skip
    # The total batch size is the recipe's: nothing to say about it.
    assert 'total batch size' not in result.stdout
    log = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [entry['loss'] for entry in map(json.loads, log) if 'loss' in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    trained = [entry for entry in map(json.loads, log) if 'mIoU' in entry]
    assert len(trained) == 1

    checkpoint = tmp_path / 'iter_2.pth'
    run_tool(
        'python', 'tools/test.py', config, checkpoint, '--work-dir', tmp_path / 'test',
        '--show-dir', tmp_path / 'drawn', '--cfg-options', *overrides,
    )  # fmt: skip
    tested = metrics(tmp_path / 'test')
    for key in ('aAcc', 'mIoU', 'mAcc'):
        assert tested[key] == trained[0][key]
    assert len(list((tmp_path / 'drawn').rglob('*.png'))) == 5

    run_tool(
        'bash', 'tools/dist_test.sh', config, checkpoint, 2, '--tta',
        '--work-dir', tmp_path / 'tta', '--cfg-options', *overrides,
    )  # fmt: skip
    assert 0 <= metrics(tmp_path / 'tta')['mIoU'] <= 100


def test_tta_is_an_option_of_the_test_tool():
    cfg = read(RECIPE.format('b'))
    assert cfg.test_dataloader.dataset.pipeline == cfg.test_pipeline
    options.enable_tta(cfg)
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_pipeline
