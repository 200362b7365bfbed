# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

from mlla_mm.datasets.transforms.erasing import DrawErasing

HEIGHT, WIDTH = 120, 80


def draw(erasing, number):
    """Boxes and seeds of packed images, None where there is none."""
    np.random.seed(0)
    found = []
    for _ in range(number):
        sample = BaseDataElement()
        erasing(dict(inputs=torch.zeros(3, HEIGHT, WIDTH), data_samples=sample))
        found.append(sample.get('erasing'))
    return found


def test_distribution_of_boxes():
    """Against boxes of the formula that are drawn at once and kept where they fit."""
    found = draw(DrawErasing(prob=0.25), 16000)
    boxes = np.array([box[:4] for box in found if box is not None], float)
    assert abs(len(boxes) / len(found) - 0.25) < 0.015
    rng = np.random.default_rng(1)
    area = HEIGHT * WIDTH * rng.uniform(0.02, 1 / 3, 10**6)
    aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3), 10**6))
    rows, columns = np.round((area * aspect) ** 0.5), np.round((area / aspect) ** 0.5)
    fits = (rows < HEIGHT) & (columns < WIDTH)
    assert fits.mean() < 0.99  # some are drawn again
    top, left = (
        np.floor(rng.uniform(0, 1, 10**6) * (whole - part + 1))
        for whole, part in ((HEIGHT, rows), (WIDTH, columns))
    )
    expected = np.stack([top, left, rows, columns], axis=1)[fits]
    for i in range(4):
        error = expected[:, i].std() / len(boxes) ** 0.5
        assert abs(boxes[:, i].mean() - expected[:, i].mean()) < 4 * error, i
        assert boxes[:, i].std() == pytest.approx(expected[:, i].std(), rel=0.05), i
        assert boxes[:, i].min() == expected[:, i].min() or i > 1
    product, reference = (x[:, 2] * x[:, 3] for x in (boxes, expected))
    assert product.mean() == pytest.approx(reference.mean(), rel=0.05)
    assert (boxes[:, 0] + boxes[:, 2]).max() == HEIGHT
    assert (boxes[:, 1] + boxes[:, 3]).max() == WIDTH
    seeds = [box[4] for box in found if box is not None]
    assert len(set(seeds)) == len(seeds) and max(seeds) > 2**61


def test_none_and_all():
    assert draw(DrawErasing(prob=0.0), 50) == [None] * 50
    assert None not in draw(DrawErasing(prob=1.0), 50)
    # Such a box never fits.
    long = DrawErasing(prob=1.0, area_ratio_range=(1.0, 1.0), aspect_range=(9.0, 9.0))
    assert draw(long, 5) == [None] * 5


@pytest.mark.parametrize(
    'name, value',
    [('prob', 1.5), ('area_ratio_range', (0.5, 0.1)), ('aspect_range', (0, 1))],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        DrawErasing(**{name: value})


def test_an_image_that_is_not_packed():
    with pytest.raises(ValueError, match='behind PackInputs'):
        DrawErasing()(dict(img=np.zeros((9, 9, 3), np.uint8)))
