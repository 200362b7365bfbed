# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Samples of the recipe's pipelines against those of mmseg's own transforms."""

import copy
import random

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

pytest.importorskip('mmseg')
from mmseg.datasets import transforms as mmsegs  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402

from mlla_mm.datasets.transforms import segmentation  # noqa: E402
from mlla_mm.engine.parts import parts_of  # noqa: E402

from ...pipelines import of_the_toolbox  # noqa: E402
from ...processes import ROOT  # noqa: E402


@pytest.fixture(autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def recipe(key):
    """A pipeline for images and crops of an eighth of the recipe's sides."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/ade20k.py')
    for part in parts_of(cfg[f'{key}_pipeline']):
        for name in {'scale', 'crop_size'} & set(part):
            part[name] = tuple(side // 8 for side in part[name])
    return cfg[f'{key}_pipeline']


def image_of(folder, name, labels):
    """What mmseg's data sets hand to a pipeline."""
    rng = np.random.RandomState(0)
    height, width = labels.shape
    small = rng.randint(0, 256, (9, 12, 3)).astype(np.uint8)
    paths = [str(folder / f'{name}_{kind}.png') for kind in ('image', 'labels')]
    assert cv2.imwrite(paths[0], cv2.resize(small, (width, height)))
    assert cv2.imwrite(paths[1], labels)
    return dict(
        img_path=paths[0],
        seg_map_path=paths[1],
        label_map=None,
        reduce_zero_label=True,
        seg_fields=[],
    )


@pytest.fixture
def images(tmp_path):
    rng = np.random.RandomState(0)
    usual = rng.choice([0, 1, 2, 77, 150, 255], (12, 16)).astype(np.uint8)
    # Crops are drawn anew: of one class, of one and what is ignored, of a rare one.
    most = np.full((150, 100), 9, np.uint8)
    most[:60, :30] = 4
    return [
        image_of(tmp_path, 'usual', cv2.resize(usual, (200, 150), None, 0, 0, 0)),
        image_of(tmp_path, 'one', np.full((30, 200), 7, np.uint8)),
        image_of(tmp_path, 'ignored', np.full((150, 100), 0, np.uint8)),
        image_of(tmp_path, 'most', most),
    ]


def run(pipeline, image, seed):
    random.seed(seed)
    np.random.seed(seed)
    sample = pipeline(copy.deepcopy(image))
    return sample, random.random(), np.random.rand()


def assert_same(ours, theirs):
    assert ours[1:] == theirs[1:]
    ours, theirs = ours[0], theirs[0]
    inputs, samples = (
        [x[key] if isinstance(x[key], list) else [x[key]] for x in (ours, theirs)]
        for key in ('inputs', 'data_samples')
    )
    assert len(inputs[0]) == len(inputs[1])
    for mine, other in zip(*inputs):
        assert torch.equal(mine, other) and mine.is_contiguous()
    for mine, other in zip(*samples):
        assert mine.metainfo == other.metainfo
        assert torch.equal(mine.gt_sem_seg.data, other.gt_sem_seg.data)


@pytest.mark.parametrize('key, seeds', [('train', 100), ('test', 1), ('tta', 1)])
def test_samples_are_mmsegs(images, key, seeds):
    pipeline = recipe(key)
    ours, theirs = Compose(pipeline), Compose(of_the_toolbox(pipeline))
    for seed in range(seeds):
        for image in images:
            assert_same(run(ours, image, seed), run(theirs, image, seed))


@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.uint16])
@pytest.mark.parametrize('ignored', [255, 4])
@pytest.mark.parametrize('ratio', [0.3, 0.75, 1.0])
def test_crop(dtype, ignored, ratio):
    rng = np.random.RandomState(0)
    labels = rng.choice([3, 4, 5, 255], (40, 60), p=[0.6, 0.2, 0.1, 0.1]).astype(dtype)
    results = dict(img=np.zeros((40, 60, 3), np.uint8), gt_seg_map=labels)
    args = dict(crop_size=(3, 5), cat_max_ratio=ratio, ignore_index=ignored)
    boxes, states = [], []
    for module in (segmentation, mmsegs):
        np.random.seed(0)
        crop = module.RandomCrop(**args)
        boxes.append([crop.crop_bbox(results) for _ in range(100)])
        states.append(np.random.rand())
    assert boxes[0] == boxes[1]
    assert states[0] == states[1]


def test_crop_is_kept_for_several_images():
    """mmcv's transforms may ask for the same random choice again."""
    crop = segmentation.RandomCrop((3, 5), cat_max_ratio=0.75)
    labels = np.arange(2400, dtype=np.uint8).reshape(40, 60)
    results = dict(img=np.zeros((40, 60, 3), np.uint8), gt_seg_map=labels)
    from mmcv.transforms.utils import cache_random_params

    with cache_random_params(crop):
        assert len({crop.crop_bbox(results) for _ in range(9)}) == 1


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
@pytest.mark.parametrize('view', ['whole', 'crop', 'flip'])
def test_photometric_distortion(dtype, view):
    rng = np.random.RandomState(0)
    # All values of each channel.
    image = rng.permutation(256 * 24) % 256
    image = image.reshape(32, 64, 3).astype(dtype)
    views = dict(crop=np.s_[3:30, 5:60], flip=np.s_[:, ::-1])
    image = image[views[view]] if view in views else image
    kept = image.copy()
    runs = []
    for module in (segmentation, mmsegs):
        distort = module.PhotoMetricDistortion()
        np.random.seed(0)
        runs.append([distort(dict(img=image))['img'] for _ in range(150)])
        runs[-1].append(np.random.rand(3))
    for ours, theirs in zip(*runs):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(image, kept)
