# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import csv
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from torch import nn

from mlla_mm.datasets import digits

from .. import reference
from ..nano import NANO

CONFIGS = Path(__file__).parents[2] / 'configs' / 'detection'
FLOAT32_BOXES = 'mlla_mm.models.float32_boxes'
mmdet = pytest.importorskip('mmdet')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'mask-rcnn_mlla-{name}.py')


@pytest.mark.parametrize(
    'name, parameters, drop_path_rate, epochs',
    [
        ('t_fpn_1x_coco', 44_031_120, 0.1, 12),
        ('s_fpn_1x_coco', 62_653_968, 0.1, 12),
        ('b_fpn_1x_coco', 115_490_208, 0.1, 12),
        ('t_fpn_3x_coco', 44_031_120, 0.3, 36),
        ('s_fpn_3x_coco', 62_653_968, 0.3, 36),
    ],
)
def test_model_of_the_recipe(name, parameters, drop_path_rate, epochs):
    cfg = read(name)
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    # BatchNorm is neither frozen nor held in evaluation mode.
    assert all(p.requires_grad for p in model.parameters())
    last_block = model.backbone.layers[-1].blocks[-1]
    assert last_block.drop_path.drop_prob == pytest.approx(drop_path_rate)
    assert cfg.train_cfg.max_epochs == epochs
    size = name[0].upper()
    assert cfg.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'data/MLLA_{size}.pth'
    )
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.val_dataloader.batch_size == cfg.test_dataloader.batch_size == 1


def installed(path: str) -> Config:
    """A config of mmdet's own."""
    config = Path(mmdet.__file__).parent / '.mim' / 'configs' / path
    if not config.is_file():
        pytest.skip('mmdet is installed without its configs')
    return Config.fromfile(config)


@pytest.mark.parametrize('size, channels', [('t', 64), ('s', 64), ('b', 96)])
def test_all_but_the_backbone_is_mmdets(size, channels):
    """Heads, assigners, samplers, thresholds and normalisation.

    In float32, the RPN and the extractors compute what mmdet's do.
    """
    ours = read(f'{size}_fpn_1x_coco').model
    theirs = installed('_base_/models/mask-rcnn_r50_fpn.py').model
    theirs.backbone = ours.backbone
    theirs.neck.in_channels = [channels, 2 * channels, 4 * channels, 8 * channels]
    theirs.rpn_head.type = f'{FLOAT32_BOXES}.Float32RPNHead'
    for kind in ('bbox', 'mask'):
        extractor = theirs.roi_head[f'{kind}_roi_extractor']
        extractor.type = f'{FLOAT32_BOXES}.Float32RoIExtractor'
    assert ours.to_dict() == theirs.to_dict()


def test_extractors_can_be_replaced():
    """A config that inherits may name mmdet's, or ours by name once it is imported."""
    from mmdet.models import RPNHead, SingleRoIExtractor

    from mlla_mm.models.float32_boxes import Float32RoIExtractor

    cfg = read('nano_fpn_digits')
    cfg.merge_from_dict(
        {
            'model.rpn_head.type': 'RPNHead',
            'model.roi_head.bbox_roi_extractor.type': 'SingleRoIExtractor',
            'model.roi_head.mask_roi_extractor.type': 'Float32RoIExtractor',
        }
    )
    model = MODELS.build(cfg.model)
    assert type(model.rpn_head) is RPNHead
    assert type(model.roi_head.bbox_roi_extractor) is SingleRoIExtractor
    assert type(model.roi_head.mask_roi_extractor) is Float32RoIExtractor


def without_defaults(config):
    """A config with mmdet's transforms, and without what mmdet's own spells out."""
    if isinstance(config, str):
        return config.replace('mlla_mm.datasets.transforms.detection.', '')
    if isinstance(config, dict):
        spelled_out = dict(backend_args=None, format_only=False, decode_masks=False)
        return {
            key: without_defaults(value)
            for key, value in config.items()
            if key not in spelled_out or value != spelled_out[key]
        }
    if isinstance(config, (list, tuple)):
        return [without_defaults(value) for value in config]
    return config


def test_data_and_metric_are_mmdets():
    """All but the pipeline of training, which is Swin Transformer's."""
    ours = read('t_fpn_1x_coco')
    theirs = installed('_base_/datasets/coco_instance.py')
    theirs.train_dataloader.dataset.pipeline = ours.train_dataloader.dataset.pipeline
    keys = [f'{split}_dataloader' for split in ('train', 'val', 'test')]
    for key in (*keys, 'val_evaluator', 'test_evaluator'):
        assert without_defaults(ours[key]) == without_defaults(theirs[key]), key


@pytest.mark.parametrize('name', ['t_fpn_1x_coco', 'b_fpn_1x_coco', 's_fpn_3x_coco'])
def test_optimizer_groups(name):
    cfg = read(name)
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper).__name__ == 'OptimWrapper'  # float32, no clipping
    assert not wrapper.clip_grad_kwargs
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in wrapper.optimizer.param_groups:
        assert group['lr'] == 1e-4
        assert group['betas'] == (0.9, 0.999)
        for p in group['params']:
            parameter = names[id(p)]
            seen.add(parameter)
            expected = 0.0 if 'norm' in parameter else 0.05
            assert group['weight_decay'] == expected, parameter
    assert seen == set(names.values())
    # The recipe's exception covers norms alone: biases of other layers do decay.
    assert {'backbone.norm0.weight', 'backbone.patch_embed.conv1.norm.bias'} <= seen


@pytest.mark.parametrize('schedule', ['1x', '3x'])
def test_learning_rate(schedule):
    cfg = read(f't_fpn_{schedule}_coco')
    with open(reference.DATA / 'coco_learning_rate.csv') as file:
        rows = [row for row in csv.DictReader(file) if row['schedule'] == schedule]
    expected = {int(row['iteration']): float(row['learning_rate']) for row in rows}
    epoch_length = int(rows[0]['iterations_per_epoch'])

    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-4)
    built = [
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer))
        for scheduler in cfg.param_scheduler
    ]
    by_epoch = [scheduler for scheduler in built if scheduler.by_epoch]
    by_iteration = [scheduler for scheduler in built if not scheduler.by_epoch]
    for iteration in range(cfg.train_cfg.max_epochs * epoch_length):
        if iteration in expected:
            rate = optimizer.param_groups[0]['lr']
            assert rate == pytest.approx(expected.pop(iteration), rel=1e-6), iteration
        if iteration < 1000:  # by then the warm-up is over
            for scheduler in by_iteration:
                scheduler.step()
        if (iteration + 1) % epoch_length == 0:
            for scheduler in by_epoch:
                scheduler.step()
    assert not expected


@pytest.fixture
def sample(tmp_path) -> dict:
    image = np.zeros((480, 640, 3), dtype=np.uint8)
    image[:, 320:] = 255  # a flip shows
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    polygon = [10.0, 10.0, 630.0, 10.0, 630.0, 470.0, 10.0, 470.0]
    return dict(
        img_path=str(tmp_path / 'image.png'),
        img_id=1,
        height=480,
        width=640,
        instances=[
            dict(bbox=[10, 10, 630, 470], bbox_label=0, mask=[polygon], ignore_flag=0)
        ],
    )


@pytest.mark.parametrize('name', ['t_fpn_1x_coco', 's_fpn_3x_coco'])
def test_train_pipeline(name, sample):
    np.random.seed(0)
    pipeline = Compose(read(name).train_dataloader.dataset.pipeline)
    runs = [pipeline(dict(sample)) for _ in range(120)]
    metas = [run['data_samples'] for run in runs]

    short_sides = {min(meta.img_shape) for meta in metas}
    assert short_sides <= set(range(480, 801, 32))
    assert len(short_sides) > 8
    assert max(max(meta.img_shape) for meta in metas) <= 1333
    # A crop of at least 384 out of a short side of 400 to 600 changes the ratio.
    whole = [math.isclose(m.img_shape[1] / m.img_shape[0], 4 / 3, rel_tol=0.01)
             for m in metas]  # fmt: skip
    assert 0.3 < np.mean(whole) < 0.7
    flipped = [meta.flip for meta in metas]
    assert 0.35 < np.mean(flipped) < 0.65
    for run, meta, is_whole in zip(runs, metas, whole):
        if is_whole:  # white is on the right, but for a flip
            left, right = run['inputs'][0, 5, 5], run['inputs'][0, 5, -5]
            assert (left > right) == meta.flip


def test_crop_of_the_train_pipeline():
    choice = read('t_fpn_1x_coco').train_dataloader.dataset.pipeline[3]
    assert choice.get('prob') is None  # equal chance
    resize, crop, _ = choice.transforms[1]
    assert list(resize.scales) == [(400, 1333), (500, 1333), (600, 1333)]
    assert crop.crop_type == 'absolute_range'
    assert crop.crop_size == (384, 600)
    assert crop.allow_negative_crop


def test_test_pipeline_and_normalisation(sample):
    cfg = read('t_fpn_1x_coco')
    data = Compose(cfg.test_dataloader.dataset.pipeline)(sample)
    meta = data['data_samples']
    assert meta.img_shape == (800, 1067)
    assert meta.scale_factor == pytest.approx((1067 / 640, 800 / 480))
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    blue = torch.zeros_like(data['inputs'])
    blue[0] = 255  # images are read as BGR
    batch = preprocessor(dict(inputs=[blue], data_samples=[meta]))['inputs']
    assert batch.shape == (1, 3, 800, 1088)  # a multiple of 32
    expected = [-123.675 / 58.395, -116.28 / 57.12, (255 - 103.53) / 57.375]
    assert batch[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert batch[0, :, 0, -1].tolist() == [0, 0, 0]


def test_training_images_without_use_are_dropped():
    cfg = read('t_fpn_1x_coco').train_dataloader
    assert cfg.dataset.filter_cfg == dict(filter_empty_gt=True, min_size=32)
    assert cfg.batch_sampler.type == 'AspectRatioBatchSampler'


def leaves(config: dict, path: tuple = ()) -> dict:
    """The values of a config by the keys that lead to them."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found.update(leaves(value, (*path, key)))
        else:
            found[(*path, key)] = value
    return found


def test_inheritance_example(tmp_path):
    """The README's new experiment differs from its base in what it says, and runs."""
    readme = (CONFIGS.parents[1] / 'README.md').read_text()
    example = readme.split('<!-- inheritance example -->')[1]
    code = example.split('```python\n')[1].split('```')[0]
    said = {}
    exec(code, {}, said)
    base = said.pop('_base_')
    assert base == './mask-rcnn_mlla-t_fpn_1x_coco.py'
    config = tmp_path / 'my_experiment.py'
    config.write_text(code.replace(base, str(CONFIGS / base)))
    cfg = Config.fromfile(config)
    assert leaves(cfg.to_dict()) == {
        **leaves(read('t_fpn_1x_coco').to_dict()),
        **leaves(said),
    }
    model = MODELS.build(cfg.model).eval()
    build_optim_wrapper(model, cfg.optim_wrapper)
    with torch.no_grad():
        assert len(model.extract_feat(torch.rand(1, 3, 64, 96))) == 5


def test_digits_have_colours_of_their_own():
    """COCO's would be taken in their order, and some are too dark to tell."""
    for split in ('train', 'val', 'test'):
        cfg = Config.fromfile(NANO['mmdet'])
        meta = cfg[f'{split}_dataloader'].dataset.metainfo
        assert meta.classes == digits.CLASSES
        assert [tuple(color) for color in meta.palette] == digits.PALETTE
