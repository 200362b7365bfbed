# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mlla_mm.datasets import digits
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


def pairs(cfg, figures, tmp_path, **options) -> list:
    """The panels of every sample: as stored, and augmented."""
    training_sheet(cfg, tmp_path / 'sheet.png', **options)
    axes = [ax for ax in figures[-1].axes if ax.images]
    # The sheet goes through the figure's left half first.
    return [(left, right) for left, right in zip(axes[::2], axes[1::2])]


def picture(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def test_samples_of_the_data_set(cfg, figures, tmp_path):
    found = pairs(cfg, figures, tmp_path, num_images=3)
    assert len(found) == 3
    assert not np.array_equal(picture(found[0][0]), picture(found[1][0]))
    for left, right in found:
        assert picture(left).dtype == picture(right).dtype == np.uint8
        assert picture(left).shape[2] == picture(right).shape[2] == 3
    sheet = cv2.imread(str(tmp_path / 'sheet.png'))
    assert sheet.shape[1] > 1000
    assert sheet.std() > 20


def test_colours_are_those_of_the_file(cfg, figures, tmp_path):
    """RGB on both sides, where nothing but the size changes."""
    cfg = copy.deepcopy(cfg)  # the fixture serves other tests
    pipeline = cfg.train_dataloader.dataset.pipeline
    kept = ('Load', 'Pack', 'Resize')
    cfg.train_dataloader.dataset.pipeline = [
        step for step in pipeline if step['type'].startswith(kept)
    ]
    ((left, right),) = pairs(cfg, figures, tmp_path, num_images=1)
    mean_left, mean_right = (picture(x).reshape(-1, 3).mean(0) for x in (left, right))
    assert np.ptp(mean_left) > 3  # the order of the channels shows
    assert np.abs(mean_left - mean_right).max() < 2


def test_one_sample_again_and_again(cfg, figures, tmp_path):
    found = pairs(cfg, figures, tmp_path, num_images=3, repeat=True)
    assert len(found) == 3
    for left, _ in found:
        assert np.array_equal(picture(left), picture(found[0][0]))
    if cfg.default_scope == 'mmpretrain':  # the others are not augmented
        assert not np.array_equal(picture(found[0][1]), picture(found[1][1]))


def test_erased_boxes_are_drawn(cfg, figures, tmp_path):
    if cfg.default_scope != 'mmpretrain':
        pytest.skip('The recipe of classification erases.')
    cfg = copy.deepcopy(cfg)
    area = (0.2, 0.2)
    cfg.train_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='PackInputs'),
        dict(
            type='mlla_mm.datasets.transforms.erasing.DrawErasing',
            prob=1.0,
            area_ratio_range=area,
        ),
    ]
    ((left, right),) = pairs(cfg, figures, tmp_path, num_images=1)
    differs = (picture(left) != picture(right)).any(-1)
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    box = picture(right)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box[..., 0].size == pytest.approx(0.2 * differs.size, rel=0.1)
    # The noise has the mean of all images, in the order of the channels.
    mean = cfg.model.data_preprocessor.mean
    assert box.reshape(-1, 3).mean(0) == pytest.approx(mean, abs=9)
    # A model that does not normalise sees noise about 0.
    for key in ('mean', 'std'):
        cfg.model.data_preprocessor.pop(key)
    ((_, right),) = pairs(cfg, figures, tmp_path, num_images=1)
    assert (picture(right) <= 5).all(-1).mean() > 0.15


def test_labels_are_drawn(cfg, figures, tmp_path):
    """The first sample's, as they are in its files."""
    ((left, right),) = pairs(cfg, figures, tmp_path, num_images=1)
    root = Path(cfg.train_dataloader.dataset.data_root)
    texts = [text.get_text() for text in right.texts]
    assert not left.texts
    if cfg.default_scope == 'mmdet':
        stored = json.loads((root / 'annotations' / 'instances_train.json').read_text())
        names = {category['id']: category['name'] for category in stored['categories']}
        first = stored['images'][0]['id']
        assert texts == [
            names[a['category_id']]
            for a in stored['annotations']
            if a['image_id'] == first
        ]
        assert len(right.patches) == len(texts)
    elif cfg.default_scope == 'mmpretrain':
        # Folders are classes.
        assert texts == [sorted((root / 'train').iterdir())[0].name]
    else:
        path = sorted((root / 'annotations' / 'training').iterdir())[0]
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) - 1  # 0: unlabelled
        [legend] = figures[-1].legends
        names = [text.get_text() for text in legend.get_texts()]
        assert names == [digits.SEG_CLASSES[i] for i in np.unique(labels)]
        painted = right.images[1].get_array()
        assert painted.shape[:2] == (96, 96)
        label = labels.max()
        expected = np.array(digits.SEG_PALETTE[label]) / 255
        share = np.isclose(painted[..., :3], expected).all(-1).mean()
        assert share == pytest.approx((labels == label).mean(), abs=0.02)


def test_errors():
    with pytest.raises(ValueError, match="got 'mmagic'"):
        training_sheet(Config(dict(default_scope='mmagic')), 'x.png')
    with pytest.raises(ValueError, match='at least 1, got 0'):
        training_sheet(Config(dict(default_scope='mmseg')), 'x.png', num_images=0)
    with pytest.raises(ValueError, match='no train_dataloader'):
        training_sheet(Config(dict(default_scope='mmseg')), 'x.png')


@pytest.mark.parametrize(
    'mix',
    [
        [dict(type='Mosaic', img_scale=(64, 64))],
        # Its images are floats.
        [dict(type='MixUp', img_scale=(64, 64))],
        # Its images are integers of 64 bits, and it pastes by masks.
        [dict(type='CopyPaste', max_num_pasted=2)],
    ],
    ids=lambda mix: mix[0]['type'],
)
def test_mixed_images(figures, tmp_path, mix):
    pytest.importorskip('mmdet')
    name, make = TASKS['mmdet']
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = str(make(tmp_path / 'data', train=4, val=1, size=64))
    dataset.pipeline[1].with_mask = mix[0]['type'] == 'CopyPaste'
    load, pack = dataset.pipeline[:2], dataset.pipeline[-1]
    cfg.train_dataloader.dataset = dict(
        type='MultiImageMixDataset',
        dataset=dict(dataset, pipeline=load),
        pipeline=[*mix, pack],
    )
    for left, right in pairs(cfg, figures, tmp_path, num_images=2):
        assert picture(left).dtype == picture(right).dtype == np.uint8
        # As bright as the image that it begins with: nothing is cut off at 1.
        assert 0.5 < picture(right).mean() / picture(left).mean() < 2
        assert picture(right).std() > 5
        assert right.patches
