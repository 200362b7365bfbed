# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import cv2
import pytest

from mlla_mm.visualization.curves import plot_curves, read_scalars


@pytest.fixture
def work_dir(tmp_path):
    """A run of two epochs, interrupted and resumed at epoch 1."""
    runs = {
        '20260101_000000': [
            dict(loss=4.0, step=1, epoch=1, iter=1),
            dict(loss=3.0, step=2, epoch=1, iter=2),
            {'coco/bbox_mAP': 0.2, 'step': 1},
            dict(loss=9.0, step=3, epoch=2, iter=3),
        ],
        '20260102_000000': [
            dict(loss=2.5, step=3, epoch=2, iter=3),
            dict(loss=2.0, step=4, epoch=2, iter=4),
            {'coco/bbox_mAP': 0.3, 'step': 2},
        ],
    }
    for name, entries in runs.items():
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        lines = [json.dumps(entry) for entry in entries]
        (folder / 'scalars.json').write_text('\n'.join(lines) + '\n')
    return tmp_path


def test_resumed_runs_are_read_as_one(work_dir):
    curves = read_scalars(work_dir)
    assert curves['loss'] == [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]
    assert curves['coco/bbox_mAP'] == [(1, 0.2), (2, 0.3)]


def test_plot(work_dir, tmp_path):
    plot_curves(work_dir, ['coco/bbox_mAP'], tmp_path / 'curves.png')
    picture = cv2.imread(str(tmp_path / 'curves.png'))
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture.std() > 10


def test_errors(work_dir, tmp_path):
    with pytest.raises(ValueError, match='coco/segm_mAP'):
        plot_curves(work_dir, ['coco/segm_mAP'], tmp_path / 'curves.png')
    with pytest.raises(FileNotFoundError, match='no run yet'):
        read_scalars(work_dir / 'elsewhere')
