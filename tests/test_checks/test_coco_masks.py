# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Masks of COCO's format, and what mmdet and pycocotools make of them."""

import numpy as np
import pytest

from mlla_mm.checks.coco_masks import mask_area, mask_problem, repaired_mask

for package in ('mmdet', 'pycocotools'):
    pytest.importorskip(package)
from mmdet.datasets.transforms import LoadAnnotations  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402

WIDTH, HEIGHT = 60, 40
GOOD = [4, 4, 24, 4, 24, 24]


def encode(pixels, is_compressed):
    rle = coco_mask.encode(np.asfortranarray(pixels, np.uint8))
    if is_compressed:
        return dict(rle, counts=rle['counts'].decode())
    values = pixels.ravel(order='F')
    edges = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *edges, values.size]).tolist()
    return dict(size=rle['size'], counts=[0, *runs] if values[0] else runs)


@pytest.mark.parametrize('is_compressed', [True, False])
@pytest.mark.parametrize('share', [0, 0.001, 0.01, 0.5, 1])
def test_run_length_encodings(share, is_compressed):
    generator = np.random.default_rng(0)
    for height, width in ((HEIGHT, WIDTH), (500, 700), (1, 1)):
        pixels = generator.random((height, width)) < share
        rle = encode(pixels, is_compressed)
        assert mask_problem(rle, width, height) == ''
        assert repaired_mask(rle, width, height) == rle
        assert mask_area(rle, width, height) == pixels.sum()
        assert 'size' in mask_problem(rle, width + 1, height)
        for change in (lambda counts: counts[:-1], lambda counts: counts + counts):
            broken = dict(rle, counts=change(rle['counts']))
            assert mask_problem(broken, width, height)


@pytest.mark.parametrize('counts', ['', '0' * 99, 'hello world', '\x00', '\u20ac', 'P'])
def test_text_that_is_no_encoding(counts):
    rle = dict(size=[HEIGHT, WIDTH], counts=counts)
    assert 'not all pixels' in mask_problem(rle, WIDTH, HEIGHT)


def is_used(mask):
    """Whether mmdet trains with a mask."""
    instance = dict(bbox=[4, 4, 24, 24], bbox_label=0, ignore_flag=0, mask=mask)
    load = LoadAnnotations(with_mask=True)
    results = dict(instances=[instance], ori_shape=(HEIGHT, WIDTH))
    load.transform(results)
    return not results['gt_ignore_flags'].any()


# The first is that of newer versions of NumPy.
_NEGATIVE = (OverflowError, ValueError)
# What mmdet does: an error, no training with the mask, or the usable part.
MASKS = {
    'polygon': ([GOOD], True, [GOOD]),
    'two polygons': ([GOOD, GOOD], True, [GOOD, GOOD]),
    'two corners': ([[4, 4, 24, 24]], False, None),
    'points': ([[4, 4], [24, 4], [24, 24]], False, None),
    'half a point': ([[*GOOD, 4]], False, None),
    'no numbers': ([[]], False, None),
    'a bad one later': ([GOOD, [4, 4]], True, [GOOD]),
    'a bad one first': ([[], GOOD], True, [GOOD]),
    'flat': (GOOD, TypeError, [GOOD]),
    'deep': ([[GOOD[:2], GOOD[2:4], GOOD[4:]] * 2], ValueError, None),
    'null': ([None], TypeError, None),
    'text': ('4 4 24 4 24 24', TypeError, None),
    'no size': (dict(counts=[0, 2400]), False, None),
    'no counts': (dict(size=[40, 60]), False, None),
    # mmdet takes the rows of pixels for shorter or longer ones.
    'turned': (dict(size=[60, 40], counts=[0, 2400]), True, None),
    'other size': (dict(size=[40, 61], counts=[0, 2440]), ValueError, None),
    'long': (dict(size=[40, 60], counts=[0, 9999999]), ValueError, None),
    'negative': (dict(size=[40, 60], counts=[-1, 2401]), _NEGATIVE, None),
}


@pytest.mark.parametrize('case', MASKS)
def test_masks(case):
    mask, used, repaired = MASKS[case]
    assert repaired_mask(mask, WIDTH, HEIGHT) == repaired
    assert (mask_problem(mask, WIDTH, HEIGHT) == '') == (mask == repaired)
    if isinstance(used, bool):
        assert is_used(mask) == used
    else:
        with pytest.raises(used):
            is_used(mask)
    if repaired:
        rle = coco_mask.merge(coco_mask.frPyObjects(repaired, HEIGHT, WIDTH))
        assert mask_area(repaired, WIDTH, HEIGHT) == coco_mask.decode(rle).sum() > 0


@pytest.mark.parametrize(
    'number', [float('nan'), float('inf'), -float('inf'), 1e7, -1e7, 10**400, None, '4']
)
def test_coordinates_that_take_all_memory(number):
    """pycocotools ends the process on some of them."""
    for i in range(6):
        polygon = [*GOOD[:i], number, *GOOD[i + 1 :]]
        assert 'coordinates' in mask_problem([GOOD, polygon], WIDTH, HEIGHT)
        assert repaired_mask([GOOD, polygon], WIDTH, HEIGHT) == [GOOD]
