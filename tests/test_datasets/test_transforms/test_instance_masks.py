# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Masks that are decoded late, against mmdet's, which are bitmaps from the start."""

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
import mmcv  # noqa: E402
from mmdet.datasets.transforms import LoadAnnotations  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402

from mlla_mm.datasets.transforms.instance_masks import InstanceMasks  # noqa: E402

SIZES = [(60, 80), (1, 1), (1, 33), (47, 1), (13, 300)]


def run_lengths(bitmap):
    """COCO's encoding without compression, which begins with the zeros."""
    pixels = np.concatenate([[0], bitmap.flatten(order='F')])
    edges = np.flatnonzero(np.diff(pixels))
    counts = np.diff(np.concatenate([[0], edges, [bitmap.size]]))
    return dict(size=list(bitmap.shape), counts=counts.tolist())


def annotations_of(rng, height, width, count=12):
    """Polygons, also outside of the image, and both encodings of random bitmaps."""
    found = []
    for number in range(count):
        if number % 3:
            center = rng.uniform(-0.3, 1.3, 2) * (width, height)
            radius = rng.uniform(0, 0.7) * max(height, width)
            polygons = [
                (center + rng.uniform(-radius, radius, (rng.randint(3, 20), 2))).ravel()
                for _ in range(rng.randint(1, 3))
            ]
            found.append([polygon.round(2) for polygon in polygons])
            continue
        bitmap = (rng.rand(height, width) < rng.choice([0, 0.01, 0.9, 1])).astype('u1')
        bitmap[: rng.randint(height) + 1] = 0
        if number % 2:
            found.append(run_lengths(bitmap))
        else:
            encoded = coco_mask.encode(np.asfortranarray(bitmap))
            found.append(dict(encoded, counts=encoded['counts'].decode()))
    return [*found, [np.zeros(6)]]


def pair(seed=0, size=(60, 80), count=12):
    """The same masks of both classes."""
    annotations = annotations_of(np.random.RandomState(seed), *size, count)
    loader = LoadAnnotations(with_mask=True)
    decoded = [loader._poly2mask(mask, *size) for mask in annotations]
    late = InstanceMasks.from_annotations(annotations, *size)
    return late, BitmapMasks(decoded, *size)


def assert_same(late, masks):
    assert len(late) == len(masks)
    assert (late.height, late.width) == (masks.height, masks.width)
    assert late.masks.dtype == masks.masks.dtype
    np.testing.assert_array_equal(late.masks, masks.masks)


def draw_step(rng, masks):
    """A method of masks, with arguments."""
    height, width = masks.height, masks.width
    new = tuple(rng.randint(1, 120, 2).tolist())
    x1, y1 = rng.randint(width), rng.randint(height)
    box = [x1, y1, rng.randint(x1, width + 9), rng.randint(y1, height + 9)]
    bigger = height + rng.randint(9), width + rng.randint(9)
    some = rng.permutation(len(masks))[: rng.randint(1, 12)]
    scale = new if min(mmcv.rescale_size((width, height), new)) else 1.5
    steps = [
        lambda x: x.rescale(scale),
        lambda x: x.rescale(1 + new[0] / 60),
        lambda x: x.resize(new),
        lambda x: x.flip(('horizontal', 'vertical', 'diagonal')[new[0] % 3]),
        lambda x: x.crop(np.array(box)),
        lambda x: x.pad(bigger),
        lambda x: x[some],
    ]
    return steps[rng.randint(len(steps))]


@pytest.mark.parametrize('size', SIZES)
def test_random_steps(size):
    rng = np.random.RandomState(0)
    between = dict(
        nothing=lambda x: x,
        sent=lambda x: pickle.loads(pickle.dumps(x)),
        decoded=lambda x: x.decode() or x,
        read=lambda x: len(x.masks) and x,
    )
    for seed in range(40):
        late, masks = pair(seed, size)
        how = list(between.values())[seed % len(between)]
        for number in range(rng.randint(7)):
            if number == 2 and isinstance(late, InstanceMasks):
                late = how(late)
            step = draw_step(rng, masks)
            late, masks = step(late), step(masks)
        assert_same(late, masks)


INDICES = [
    0,
    -1,
    slice(2, 9, 3),
    [3, 3, 1],
    np.arange(13) % 2 == 0,
    [],
    (np.arange(2),),
]


@pytest.mark.parametrize('index', INDICES, ids=str)
def test_index(index):
    late, masks = pair()
    assert_same(late[index], masks[index])
    # The others stay.
    assert_same(late, masks)


def test_iteration_and_text():
    late, masks = pair()
    assert repr(late) == repr(masks).replace('BitmapMasks', 'InstanceMasks')
    for ours, theirs in zip(pair()[0], masks):
        np.testing.assert_array_equal(ours, theirs)


# What is not done to the numbers of rows and columns.
OTHERS = dict(
    areas=lambda x: x.areas,
    to_ndarray=lambda x: x.to_ndarray(),
    to_tensor=lambda x: x.to_tensor(torch.float32, 'cpu').numpy(),
    get_bboxes=lambda x: x.get_bboxes('hbox').tensor.numpy(),
    bilinear=lambda x: x.resize((90, 70), 'bilinear').masks,
    area=lambda x: x.rescale(0.6, 'area').masks,
    pad=lambda x: x.pad((70, 90), 1).masks,
    expand=lambda x: x.expand(70, 90, 3, 5).masks,
    translate=lambda x: x.translate((60, 80), 7).masks,
    shear=lambda x: x.shear((60, 80), 0.3).masks,
    rotate=lambda x: x.rotate((60, 80), 20).masks,
    crop_and_resize=lambda x: (
        x.crop_and_resize(
            np.array([[1, 2, 50, 40.5]], 'f4'), (14, 14), np.array([3])
        ).masks
    ),
    cat=lambda x: x.cat([x, x.flip(), BitmapMasks(x.masks, 60, 80)]).masks,
)


@pytest.mark.parametrize('name', OTHERS)
def test_other_methods(name):
    late, masks = pair()
    late, masks = late.flip().crop(np.array([0, 0, 80, 60])), masks.flip()
    np.testing.assert_array_equal(OTHERS[name](late), OTHERS[name](masks))


def test_bitmaps_can_be_changed():
    late, masks = pair()
    for x in (late, masks):
        x.masks[:, 10:20] = 1
    assert_same(late.flip('vertical')[[2, 4]], masks.flip('vertical')[[2, 4]])
    for x in (late, masks):
        x.masks = 1 - x.masks[:5]
    assert_same(late, masks)


def test_bitmaps_can_be_given():
    _, masks = pair()
    assert_same(InstanceMasks(masks.masks, 60, 80).resize((9, 9)), masks.resize((9, 9)))
    assert_same(InstanceMasks(list(masks), 60, 80).flip(), masks.flip())


def test_no_masks():
    late, masks = InstanceMasks.from_annotations([], 60, 80), BitmapMasks([], 60, 80)
    for step in (lambda x: x.rescale((30, 90)), lambda x: x[:0].flip()):
        assert_same(step(late), step(masks))
    assert_same(pair()[0][[]].resize((5, 6)), masks.resize((5, 6)))


def test_encoding_of_another_size():
    """As from mmdet, which rearranges the pixels if their number is the same."""
    bitmap = np.zeros((80, 60), np.uint8)
    bitmap[3:9, 4:50] = 1
    encoded = coco_mask.encode(np.asfortranarray(bitmap))
    late = InstanceMasks.from_annotations([encoded], 60, 80)
    assert_same(late, BitmapMasks([bitmap], 60, 80))
    with pytest.raises(ValueError):
        InstanceMasks.from_annotations([encoded], 60, 81)


def test_what_is_decoded_when(monkeypatch):
    decoded = []
    decode = coco_mask.decode
    monkeypatch.setattr(coco_mask, 'decode', lambda x: decoded.append(x) or decode(x))
    late, _ = pair()
    decoded.clear()
    late = copy.deepcopy(late.flip()[[1, 4, 5]].rescale((99, 99)))
    assert not decoded
    late.decode()
    assert len(decoded) == 3
    # A box that is sent is read without a further look at the annotation.
    pickle.loads(pickle.dumps(late.pad((120, 130)))).to_ndarray()
    assert len(decoded) == 3
    assert len(pickle.dumps(late)) < late.masks.nbytes
