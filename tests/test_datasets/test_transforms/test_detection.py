# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Samples of the recipe's pipelines against those of mmdet's own transforms."""

import copy
import pickle
import random

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

pytest.importorskip('mmdet')
from mmdet.structures.mask import BitmapMasks, PolygonMasks  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402

from mlla_mm.engine.parts import parts_of  # noqa: E402

from ...pipelines import of_the_toolbox  # noqa: E402
from ...processes import ROOT  # noqa: E402
from .test_instance_masks import annotations_of, run_lengths  # noqa: E402

OURS = 'mlla_mm.datasets.transforms.detection.'


@pytest.fixture(autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def recipe(split):
    """A pipeline for images of a fifth of the recipe's sides."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/coco_instance.py')
    pipeline = cfg[f'{split}_dataloader'].dataset.pipeline
    for part in parts_of(pipeline):
        if 'crop_size' in part:
            part['crop_size'] = tuple(side // 5 for side in part['crop_size'])
        if 'scales' in part:
            part['scales'] = [(a // 5, b // 5) for a, b in part['scales']]
    return pipeline


def image_file(path, height, width):
    rng = np.random.RandomState(0)
    small = rng.randint(0, 256, (9, 12, 3)).astype(np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(small, (width, height)))
    return str(path)


def image_of(path, height, width, masks):
    """What mmdet's data sets hand to a pipeline."""
    rng = np.random.RandomState(1)
    instances = []
    for number, mask in enumerate(masks):
        x1, y1 = rng.uniform(-0.1, 0.9, 2) * (width, height)
        box = [x1, y1, *(rng.uniform((x1, y1), (width, height)))]
        if number == 3:  # of a pixel
            box = [5.0, 6.0, 6.0, 7.0]
        flag = int(isinstance(mask, dict))
        instances.append(dict(bbox=box, bbox_label=number, ignore_flag=flag, mask=mask))
    path = image_file(path, height, width)
    shape = dict(height=height, width=width)
    return dict(img_path=path, img_id=3, instances=instances, **shape)


@pytest.fixture
def images(tmp_path):
    rng = np.random.RandomState(0)
    masks = [
        [polygon.tolist() for polygon in mask] if isinstance(mask, list) else mask
        for mask in annotations_of(rng, 96, 128)
    ]
    # Such as COCO has: no polygon, none of three corners, one that is cut off.
    masks += [[], [[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 30.0, 4.0, 50.0], [9.0] * 6]]
    bitmap = np.zeros((600, 20), np.uint8)
    bitmap[100:400, 3:] = 1
    return [
        image_of(tmp_path / 'usual.png', 96, 128, masks),
        image_of(tmp_path / 'narrow.png', 600, 20, [run_lengths(bitmap)]),
        image_of(tmp_path / 'empty.png', 100, 150, []),
        # Left out by many crops.
        image_of(tmp_path / 'one.png', 300, 400, [[[1, 1, 20, 1, 20, 30]]]),
    ]


def run(pipeline, image, seed):
    random.seed(seed)
    np.random.seed(seed)
    image = copy.deepcopy(image)
    sample = pipeline(image)
    return sample, image['instances'], random.random(), np.random.rand()


def assert_same(ours, theirs):
    """Samples alike bit by bit, in the process that gets them, and random states."""
    assert ours[1:] == theirs[1:]
    ours, theirs = pickle.loads(pickle.dumps(ours[0])), theirs[0]
    assert torch.equal(ours['inputs'], theirs['inputs'])
    assert ours['inputs'].is_contiguous()
    ours, theirs = ours['data_samples'], theirs['data_samples']
    assert ours.metainfo == theirs.metainfo
    for key in ('gt_instances', 'ignored_instances'):
        mine, other = ours.get(key), theirs.get(key)
        assert set(mine.keys()) == set(other.keys())
        assert torch.equal(mine.bboxes.tensor, other.bboxes.tensor)
        assert torch.equal(mine.labels, other.labels)
        shape = other.masks.height + 3, other.masks.width + 32
        np.testing.assert_array_equal(
            mine.masks.pad(shape).masks, other.masks.pad(shape).masks
        )
        np.testing.assert_array_equal(mine.masks.masks, other.masks.masks)


@pytest.mark.parametrize('split, seeds', [('train', 40), ('test', 1)])
def test_samples_are_mmdets(images, split, seeds):
    pipeline = recipe(split)
    ours, theirs = Compose(pipeline), Compose(of_the_toolbox(pipeline))
    counts = set()
    for seed in range(seeds):
        for image in images:
            pair = run(ours, image, seed), run(theirs, image, seed)
            assert_same(*pair)
            counts.add(len(pair[1][0]['data_samples'].gt_instances))
    assert 0 in counts and max(counts) > 5


# What users add to the pipeline.
ADDED = dict(
    Expand=dict(prob=1.0),
    MinIoURandomCrop=dict(),
    RandomCrop=dict(crop_size=(60, 50), recompute_bbox=True),
    Rotate=dict(prob=1.0, level=5),
    TranslateX=dict(prob=1.0, level=5),
    Pad=dict(size_divisor=32),
    Resize=dict(scale=(70, 90)),
    RandomFlip=dict(prob=[0.2, 0.8], direction=['horizontal', 'diagonal']),
    FilterAnnotations=dict(by_mask=True, min_gt_mask_area=40),
    PhotoMetricDistortion=dict(),
    CachedMosaic=dict(img_scale=(150, 100), max_cached_images=6),
)


@pytest.mark.parametrize('kind', ADDED)
def test_further_transforms(images, kind):
    pipeline = [
        dict(type='LoadImageFromFile', to_float32=kind == 'PhotoMetricDistortion'),
        dict(type=OURS + 'LoadAnnotations', with_mask=True),
        dict(type=OURS + 'RandomFlip', prob=0.5, direction=['vertical', 'diagonal']),
        dict(type=kind, **ADDED[kind]),
        dict(type='RandomChoiceResize', scales=[(99, 70), (200, 222)], keep_ratio=True),
        dict(type=OURS + 'PackDetInputs'),
    ]
    ours, theirs = Compose(pipeline), Compose(of_the_toolbox(pipeline))
    for seed in range(10):
        pair = [run(x, images[0], seed) for x in (ours, theirs)]
        if pair[1][0] is None:  # nothing is left
            assert pair[0] == pair[1]
        else:
            assert_same(*pair)


def test_copies_between_images(images):
    results = []
    for prefix in (OURS, ''):
        load = dict(type=prefix + 'LoadAnnotations', with_mask=True)
        resize = dict(type='Resize', scale=(150, 100))
        start = Compose([dict(type='LoadImageFromFile'), load, resize])
        pack = dict(type=prefix + 'PackDetInputs')
        end = Compose([dict(type='CopyPaste'), pack])
        np.random.seed(0)
        first, second = (start(copy.deepcopy(images[i])) for i in (0, 3))
        results.append((end(dict(second, mix_results=[first])), np.random.rand()))
    assert_same(*results)


def test_loaded_masks(images):
    load = [
        dict(type='LoadImageFromFile'),
        dict(type=OURS + 'LoadAnnotations', with_mask=True, poly2mask=False),
    ]
    masks = [
        Compose(x)(copy.deepcopy(images[3]))['gt_masks']
        for x in (load, of_the_toolbox(load))
    ]
    assert all(type(x) is PolygonMasks for x in masks)
    np.testing.assert_array_equal(*[x.to_ndarray() for x in masks])
    del load[1]['poly2mask']
    assert isinstance(Compose(load)(images[0])['gt_masks'], BitmapMasks)


def test_what_is_packed(images):
    """Grey images, and annotations without masks."""
    pipeline = [
        dict(type='LoadImageFromFile', color_type='grayscale'),
        dict(type=OURS + 'LoadAnnotations'),
        dict(type=OURS + 'RandomFlip', prob=1.0),
        dict(type=OURS + 'PackDetInputs'),
    ]
    ours, theirs = (
        run(Compose(x), images[0], 0)[0] for x in (pipeline, of_the_toolbox(pipeline))
    )
    assert torch.equal(ours['inputs'], theirs['inputs'])
    assert 'masks' not in ours['data_samples'].gt_instances
