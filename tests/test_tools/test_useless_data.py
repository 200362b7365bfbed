# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Data that the toolboxes take, and from which they learn or measure nothing useful."""

import json

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from .. import bad_data
from ..bad_data import CLS, DET, HEIGHT, SEG, WIDTH, assert_says, coco_content, config
from ..processes import ROOT

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


def crowds(root):
    """Write a text that is no empty one, and thus true, in place of 0."""
    content = coco_content()
    for annotation in content['annotations']:
        annotation['iscrowd'] = '0'
    (root / 'coco.json').write_text(json.dumps(content))


def count_from(first):
    """Number the classes of label maps from 0 or 1."""

    def spoil(root):
        for path in (root / 'maps').iterdir():
            labels = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 11 + first
            bad_data.save(path, labels.astype(np.uint8))

    return spoil


def make_maps(root):
    count_from(0)(bad_data.make_masks(root))


# Good data, what is done to them, and what the error says.
DATA = {
    DET: (bad_data.make_coco, crowds, 'coco.json', 'iscrowd', 'without quotes'),
    SEG: (make_maps, count_from(1), 'maps', 'above 10', 'reduce_zero_label=True'),
    CLS: (
        bad_data.make_folders,
        bad_data.rename('val/0', 'val/x'),
        *('val', '1 has label 0', 'metainfo.classes', '(1 more)'),
    ),
}


def config_of(scope, root):
    cfg = config(scope, root)
    if scope == SEG:
        for split in ('train', 'val'):
            cfg[f'{split}_dataloader'].dataset.reduce_zero_label = False
    return cfg


@pytest.mark.parametrize('scope', DATA)
def test_a_training_is_refused(run_tool, tmp_path, scope):
    make, spoil, *words = DATA[scope]
    make(tmp_path)
    spoil(tmp_path)
    config_of(scope, tmp_path).dump(tmp_path / 'config.py')
    before = sorted(tmp_path.rglob('*'))
    tool = ROOT / 'tools/train.py'
    result = run_tool(
        'python', tool, 'config.py', cwd=tmp_path, check=False, separate=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith('Error: ')
    assert_says(line, *words)
    assert sorted(tmp_path.rglob('*')) == before


# The checks are by-passed.

FIELDS = {DET: 'pred_instances', SEG: 'pred_sem_seg', CLS: 'pred_label'}
SCORES = {DET: 'coco/bbox_mAP', SEG: 'mIoU', CLS: 'accuracy/top1'}


def read(scope, cfg):
    """The samples of the validation as the toolbox gives them to its metrics."""
    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    return dataset, [dataset[i]['data_samples'] for i in range(len(dataset))]


def predict(scope, cfg):
    """What a model gives that makes no mistake."""
    dataset, samples = read(scope, cfg)
    if scope == SEG:
        return [PixelData(data=x.gt_sem_seg.data) for x in samples]
    if scope == CLS:
        return [x.gt_label for x in samples]
    found = []
    for i in range(len(dataset)):
        objects = dataset.get_data_info(i)['instances']
        found.append(
            InstanceData(
                bboxes=torch.tensor([x['bbox'] for x in objects]),
                labels=torch.tensor([x['bbox_label'] for x in objects]),
                scores=torch.ones(len(objects)),
            )
        )
    return found


def score(scope, cfg, predictions):
    dataset, samples = read(scope, cfg)
    if scope == DET:
        cfg.val_evaluator.metric = 'bbox'
    if scope == CLS:
        # The images of the folder that was the first one.
        turned = samples[-1].img_path.endswith('x/image.png')
        predictions = predictions[1:] + predictions[:1] if turned else predictions
    for sample, predicted in zip(samples, predictions):
        sample.set_field(predicted, FIELDS[scope])
    with DefaultScope.overwrite_default_scope(scope):
        evaluator = Evaluator(cfg.val_evaluator)
        evaluator.dataset_meta = dataset.metainfo
        evaluator.process(samples)
        return evaluator.evaluate(len(samples))[SCORES[scope]]


@pytest.mark.parametrize('scope', DATA)
def test_the_score_of_perfect_predictions(tmp_path, scope):
    """The toolboxes measure it without a word."""
    make, spoil, *_ = DATA[scope]
    make(tmp_path)
    cfg = config_of(scope, tmp_path)
    predictions = predict(scope, cfg)
    assert score(scope, cfg, predictions) == (1 if scope == DET else 100)
    spoil(tmp_path)
    # COCO's metric gives -1 where there is nothing to find.
    assert score(scope, cfg, predictions) == (-1 if scope == DET else 0)
