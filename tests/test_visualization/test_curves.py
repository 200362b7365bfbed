# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import cv2
import pytest

from mlla_mm.visualization.curves import plot_curves


@pytest.mark.parametrize('last, unit', [(2, 'epoch'), (200, 'iteration')])
def test_curves(figures, tmp_path, last, unit):
    curves = {
        'loss': [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)],
        'epoch': [(1, 1), (2, 1), (3, 2), (4, 2)],
        'coco/bbox_mAP': [(1, 0.2), (last, 0.3)],
    }
    plot_curves(curves, ['coco/bbox_mAP'], tmp_path / 'curves.png')
    left, right = figures[0].axes
    assert (left.get_xlabel(), right.get_xlabel()) == ('iteration', unit)
    picture = cv2.imread(str(tmp_path / 'curves.png'))
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture.std() > 10
