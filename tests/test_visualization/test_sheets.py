# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mlla_mm.datasets import digits

CONFIGS = Path(__file__).parents[2] / 'configs'


def test_perfect_segmentation_looks_like_the_ground_truth(tmp_path):
    pytest.importorskip('mmseg')
    from mlla_mm.visualization.segmentation import segmentation_sheet

    data = digits.make_ade20k(tmp_path / 'data', train=1, val=2, size=64)
    cfg = Config.fromfile(CONFIGS / 'segmentation' / 'upernet_mlla-nano_digits.py')
    cfg.test_dataloader.dataset.data_root = str(data)
    truth = data / 'annotations' / 'validation'
    nothing = tmp_path / 'nothing'
    nothing.mkdir()
    for path in truth.iterdir():  # 1 is the background
        cv2.imwrite(str(nothing / path.name), np.ones((64, 64), np.uint8))

    def titles_and_panels(predictions):
        segmentation_sheet(cfg, predictions, tmp_path / 'sheet.png', num_images=1)
        sheet = cv2.imread(str(tmp_path / 'sheet.png')).astype(int)
        rows = sheet[sheet.shape[0] // 4 :, : sheet.shape[1] // 2]
        return np.hsplit(rows[:, : rows.shape[1] // 2 * 2], 2)

    left, right = titles_and_panels(truth)
    assert left.std() > 20
    assert np.abs(left - right).mean() < 1
    left, right = titles_and_panels(nothing)
    assert np.abs(left - right).mean() > 1


@pytest.mark.parametrize('predicted, has_red', [(3, False), (5, True)])
def test_wrong_classes_are_red(tmp_path, predicted, has_red):
    pytest.importorskip('mmpretrain')
    from mlla_mm.visualization.classification import classification_sheet

    data = digits.make_imagenet(tmp_path / 'data', train=10, val=10, size=64)
    cfg = Config.fromfile(CONFIGS / 'classification' / 'mlla-nano_digits.py')
    cfg.test_dataloader.dataset.data_root = str(data)
    grey = tmp_path / 'grey.png'
    cv2.imwrite(str(grey), np.full((8, 8, 3), 128, np.uint8))
    result = dict(
        img_path=str(grey),
        pred_label=torch.tensor([predicted]),
        gt_label=torch.tensor([3]),
        pred_score=torch.full((10,), 0.1),
    )
    (tmp_path / 'predictions.pkl').write_bytes(pickle.dumps([result]))
    classification_sheet(
        cfg, tmp_path / 'predictions.pkl', tmp_path / 'sheet.png', num_images=1
    )
    blue, green, red = cv2.split(cv2.imread(str(tmp_path / 'sheet.png')).astype(int))
    assert ((red - np.maximum(blue, green)) > 150).any() == has_red
