# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mlla_mm.datasets import digits
from mlla_mm.visualization import samples
from mlla_mm.visualization.samples import training_sheet

CONFIGS = Path(__file__).parents[2] / 'configs'
TASKS = {
    'mmdet': ('detection/mask-rcnn_mlla-nano_fpn_digits', digits.make_coco),
    'mmseg': ('segmentation/upernet_mlla-nano_digits', digits.make_ade20k),
    'mmpretrain': ('classification/mlla-nano_digits', digits.make_imagenet),
}


@pytest.fixture(scope='module', params=TASKS)
def cfg(request, tmp_path_factory):
    """Config of a task on small digits of its own."""
    pytest.importorskip(request.param)
    name, make = TASKS[request.param]
    out = tmp_path_factory.mktemp('data') / request.param
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.train_dataloader.dataset.data_root = str(make(out, train=10, val=10, size=64))
    return cfg


def pairs(cfg, monkeypatch, **options) -> list:
    """The pictures that would be put on the sheet."""
    seen = []
    monkeypatch.setattr(samples, 'save_sheet', lambda p, titles, out: seen.extend(p))
    training_sheet(cfg, 'unused.png', **options)
    return seen


def test_samples_of_the_data_set(cfg, monkeypatch):
    found = pairs(cfg, monkeypatch, num_images=3)
    assert len(found) == 3
    stored = [left for left, _ in found]
    assert not np.array_equal(stored[0], stored[1])
    for left, right in found:
        assert left.dtype == right.dtype == np.uint8
        assert left.shape[2] == right.shape[2] == 3
        # Large enough for labels.
        assert min(left.shape[:2]) >= 256 and min(right.shape[:2]) >= 256


def test_colours_are_those_of_the_file(cfg, monkeypatch):
    """RGB on both sides, where nothing but the size changes and no label is drawn."""
    cfg = copy.deepcopy(cfg)  # the fixture serves other tests
    pipeline = cfg.train_dataloader.dataset.pipeline
    kept = ('Load', 'Pack', 'Resize')
    cfg.train_dataloader.dataset.pipeline = [
        step for step in pipeline if step['type'].startswith(kept)
    ]
    monkeypatch.setitem(
        samples._DRAWERS, cfg.default_scope, lambda metainfo: lambda image, _: image
    )
    ((left, right),) = pairs(cfg, monkeypatch, num_images=1)
    mean_left, mean_right = (x.reshape(-1, 3).mean(0) for x in (left, right))
    assert np.ptp(mean_left) > 3  # the order of the channels shows
    assert np.abs(mean_left - mean_right).max() < 2


def test_one_sample_again_and_again(cfg, monkeypatch):
    found = pairs(cfg, monkeypatch, num_images=3, repeat=True)
    for left, _ in found:
        assert np.array_equal(left, found[0][0])
    if cfg.default_scope == 'mmpretrain':  # the others are not augmented
        assert not np.array_equal(found[0][1], found[1][1])


def test_sheet(cfg, tmp_path):
    training_sheet(cfg, tmp_path / 'sheet.png', num_images=2)
    picture = cv2.imread(str(tmp_path / 'sheet.png'))
    assert picture.shape[1] > 1000
    assert picture.std() > 20


def test_labels_are_drawn(tmp_path, monkeypatch):
    """A pixel's colour is its class's, where the digit is."""
    pytest.importorskip('mmseg')
    name, make = TASKS['mmseg']
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    root = make(tmp_path / 'digits', train=10, val=10, size=96)
    cfg.train_dataloader.dataset.data_root = str(root)
    ((left, right),) = pairs(cfg, monkeypatch, num_images=1)
    path = sorted((root / 'annotations' / 'training').iterdir())[0]
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    label = labels.max()  # 1 is the background
    palette = cfg.train_dataloader.dataset.metainfo.palette
    factor = right.shape[0] // 96
    inside = right[factor // 2 :: factor, factor // 2 :: factor][labels == label]
    stored = left[factor // 2 :: factor, factor // 2 :: factor][labels == label]
    expected = (stored + 2 * np.array(palette[label - 1])) / 3
    assert np.median(np.abs(inside - expected)) < 6


def test_errors():
    with pytest.raises(ValueError, match="got 'mmagic'"):
        training_sheet(Config(dict(default_scope='mmagic')), 'x.png')
    with pytest.raises(ValueError, match='at least 1, got 0'):
        training_sheet(Config(dict(default_scope='mmseg')), 'x.png', num_images=0)
