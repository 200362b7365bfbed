# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Cropping, resizing and flipping, against Pillow and the authors' pixels."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from mmpretrain.datasets import transforms
from PIL import Image

from mlla_mm.datasets.transforms.classification import (
    PackInputs,
    RandomFlip,
    RandomResizedCrop,
    ResizeEdge,
)

DATA = Path(__file__).parents[2] / 'data' / 'training'


def picture(*shape):
    """Smooth colours with some noise."""
    rng = np.random.default_rng(0)
    smooth = rng.uniform(-20, 275, (6, 6, *shape[2:]))
    smooth = cv2.resize(smooth, shape[1::-1], interpolation=cv2.INTER_CUBIC)
    noisy = smooth.reshape(shape) + rng.normal(0, 8, shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def pillow(image, width, height, interpolation='bicubic'):
    """Resized by Pillow, rows first, as the authors' versions did; 13 may not."""
    resample = Image.Resampling[interpolation.upper()]
    rows = Image.fromarray(image).resize((width, image.shape[0]), resample)
    return np.asarray(rows.resize((width, height), resample))


def assert_close(actual, expected, share=0.01):
    assert actual.dtype == np.uint8 and actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() <= share
    assert (difference > 1).mean() <= 1e-3


PICTURES = {
    'usual': picture(150, 200, 3),
    'magnified': picture(40, 50, 3),
    'reduced 20 times': picture(1300, 1700, 3),
    'thin': picture(20, 1500, 3),
    'one pixel': picture(1, 1, 3),
    'grey': picture(150, 200),
}


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('name', PICTURES)
def test_crop_is_that_of_pillow(name, interpolation):
    image = PICTURES[name]
    crop = RandomResizedCrop(scale=(64, 72), interpolation=interpolation)
    theirs = transforms.RandomResizedCrop(scale=(64, 72))
    for seed in range(5):
        np.random.seed(seed)
        actual = crop(dict(img=image))
        after = np.random.rand()
        np.random.seed(seed)
        top, left, height, width = theirs.rand_crop_params(image)
        assert np.random.rand() == after
        kept = image[top : top + height, left : left + width]
        assert actual['img_shape'] == (64, 72, *image.shape[2:])
        # Where PyTorch magnifies bilinearly, its weights have fewer bits.
        share = 0.03 if interpolation == 'bilinear' else 0.01
        assert_close(actual['img'], pillow(kept, 72, 64, interpolation), share)


@pytest.mark.parametrize('row', [0, 1])
def test_crop_is_that_of_the_authors(row, monkeypatch):
    golden = np.load(DATA / 'preprocessing.npz')
    box = tuple(map(int, golden['crop_boxes'][row]))
    crop = RandomResizedCrop(scale=224, interpolation='bicubic')
    monkeypatch.setattr(crop, 'rand_crop_params', lambda image: box)
    image = cv2.imread(str(DATA / 'image.jpg'))
    actual = crop(dict(img=image))['img'][..., ::-1]
    assert_close(actual, golden[f'crop{row}_pixels'], share=0.005)


@pytest.mark.parametrize('edge', ['short', 'long', 'width', 'height'])
@pytest.mark.parametrize('shape', [(150, 211, 3), (90, 60, 3), (70, 70)])
def test_resized_edge_is_that_of_pillow(edge, shape):
    options = dict(scale=80, edge=edge, interpolation='bicubic')
    image = picture(*shape)
    actual = ResizeEdge(**options)(dict(img=image))
    expected = transforms.ResizeEdge(**options)(dict(img=image))
    height, width = expected.pop('img').shape[:2]
    assert_close(actual.pop('img'), pillow(image, width, height))
    assert actual == expected


def test_images_that_pytorch_cannot_share():
    """Of negative strides, as mmcv's from Pillow are, or read-only."""
    image = picture(90, 60, 3)
    expected = ResizeEdge(scale=30)(dict(img=image))['img']
    locked = image.copy()
    locked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for other in (image[..., ::-1].copy()[..., ::-1], locked):
            actual = ResizeEdge(scale=30)(dict(img=other))['img']
            assert np.array_equal(actual, expected)


@pytest.mark.parametrize('kind', [RandomResizedCrop, ResizeEdge])
def test_what_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} must.*'nearest'"):
        kind(scale=32, interpolation='nearest')
    with pytest.raises(TypeError, match='backend'):
        kind(scale=32, backend='pillow')
    image = picture(60, 50, 3).astype(np.float32)
    with pytest.raises(TypeError, match=f'{kind.__name__}.*uint8.*float32'):
        kind(scale=32)(dict(img=image))


@pytest.mark.parametrize('direction', ['horizontal', 'vertical', 'diagonal'])
@pytest.mark.parametrize('shape', [(30, 40, 3), (30, 40), (30, 40, 1)])
def test_flip_is_that_of_mmcv(direction, shape):
    boxes = np.array([[3.0, 4.0, 20.0, 25.0]], dtype=np.float32)
    image = picture(*shape[:2], 3)[..., : shape[2] if len(shape) > 2 else 1]
    image = np.ascontiguousarray(image).reshape(shape)
    flips = 0
    for seed in range(10):
        both = []
        for kind in (RandomFlip, transforms.RandomFlip):
            np.random.seed(seed)
            results = dict(img=image, gt_bboxes=boxes)
            both.append(kind(prob=0.5, direction=direction)(results))
        actual, expected = both
        assert actual['img'].flags.c_contiguous or shape[2:] != (3,)
        for key in ('img', 'gt_bboxes'):
            assert np.array_equal(actual.pop(key), expected.pop(key))
        assert actual == expected
        flips += actual['flip']
    assert 0 < flips < 10


@pytest.mark.parametrize('shape', [(30, 40, 3), (30, 40), (30, 40, 1)])
def test_packing_is_that_of_mmpretrain(shape):
    image = picture(30, 40, 3).reshape(-1)[: np.prod(shape)].reshape(shape)
    for view in (image, image[:, ::-1]):
        ours, theirs = (
            kind()(dict(img=view, gt_label=3))
            for kind in (PackInputs, transforms.PackInputs)
        )
        assert ours['inputs'].is_contiguous()
        assert ours['inputs'].equal(theirs['inputs'])
        assert ours['data_samples'].gt_label == theirs['data_samples'].gt_label
