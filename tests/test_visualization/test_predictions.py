# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import os
import pickle
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.datasets import digits
from mlla_mm.evaluation.report import write_report

from ..checkpoints import attacks
from ..test_evaluation.work_dirs import add_session

CONFIGS = Path(__file__).parents[2] / 'configs'


METRICS = {
    'mmdet': {'coco/bbox_mAP': 0.7061, 'coco/segm_mAP': 0.69},
    'mmseg': {'mIoU': 85.26},
    'mmpretrain': {'accuracy/top1': 97.04},
}


@pytest.fixture
def work_dir(tmp_path):
    """What a finished run leaves; the predictions are optional."""

    def make(scope, predictions=None):
        metrics = METRICS[scope]
        for name in ('test', 'test_tta', 'test_ema'):
            path = tmp_path / name / '20260101_000000' / '20260101_000000.json'
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(metrics))
        averaged = {f'ema_{key}': value for key, value in metrics.items()}
        entries = [dict(loss=1.0, step=1, epoch=1), dict(metrics, **averaged, step=1)]
        add_session(tmp_path, '20260101_000000', entries=entries)
        if predictions is not None:
            content = pickle.dumps(predictions)
            (tmp_path / 'test' / 'predictions.pkl').write_bytes(content)
        return tmp_path

    return make


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def wrap(cfg, *others):
    """Test on several data sets."""
    datasets = [cfg.test_dataloader.dataset, *others]
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)


def detector(tmp_path):
    """A config, its annotations, an image of these, and the image's own."""
    pytest.importorskip('mmdet')
    data = digits.make_coco(tmp_path / 'data', train=1, val=2, size=64)
    cfg = Config.fromfile(CONFIGS / 'detection' / 'mask-rcnn_mlla-nano_fpn_digits.py')
    annotations = data / 'annotations' / 'instances_val.json'
    cfg.test_dataloader.dataset.data_root = str(data)
    cfg.test_dataloader.dataset.ann_file = str(annotations)
    stored = json.loads(annotations.read_text())
    image = stored['images'][0]
    image['img_path'] = os.path.join(data, 'val', image['file_name'])
    truth = [a for a in stored['annotations'] if a['image_id'] == image['id']]
    return cfg, stored, image, truth


@pytest.mark.parametrize('wrapped', [False, True])
def test_detection(tmp_path, work_dir, figures, wrapped):
    cfg, stored, image, truth = detector(tmp_path)
    if wrapped:
        # Other images of the same numbers, in which nothing is.
        (tmp_path / 'other.json').write_text(json.dumps({**stored, 'annotations': []}))
        other = dict(ann_file=str(tmp_path / 'other.json'), data_root=str(tmp_path))
        wrap(cfg, dict(cfg.test_dataloader.dataset, **other))
    names = {category['id']: category['name'] for category in stored['categories']}
    mask = truth[0]['segmentation']
    # A box to the very edge, one that hides the first, and one below the threshold.
    found = dict(
        bboxes=torch.tensor([[40.0, 0, 64, 64], [40, 1, 64, 64], [0, 0, 9, 9]]),
        labels=torch.tensor([7, 1, 2]),
        scores=torch.tensor([0.91, 0.62, 0.4]),
        masks=[mask, mask, mask],
    )
    result = dict(img_path=image['img_path'], img_id=image['id'], pred_instances=found)
    folder = work_dir('mmdet', [result])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', category=UserWarning, message='.*bounds')
        write_report(cfg, folder)
    sheet = figures[0]
    assert sheet.get_suptitle() == (
        'bbox mAP 0.706, segm mAP 0.690 on 1 validation images'
    )
    assert titles(sheet) == ['image', 'ground truth', 'prediction, score > 0.5']
    plain, left, right = sheet.axes
    assert not plain.texts
    assert [t.get_text() for t in left.texts] == [
        names[a['category_id']] for a in truth
    ]
    assert [t.get_text() for t in right.texts] == ['7 0.91', '1 0.62']
    boxes = [(*p.get_xy(), p.get_width(), p.get_height()) for p in left.patches]
    np.testing.assert_allclose(boxes, [a['bbox'] for a in truth], atol=1e-3)


def segmentor(tmp_path, val):
    """A config, and the label maps of its test data."""
    pytest.importorskip('mmseg')
    data = digits.make_ade20k(tmp_path / 'data', train=1, val=val, size=64)
    cfg = Config.fromfile(CONFIGS / 'segmentation' / 'upernet_mlla-nano_digits.py')
    cfg.test_dataloader.dataset.data_root = str(data)
    return cfg, sorted((data / 'annotations' / 'validation').iterdir())


@pytest.mark.parametrize('wrapped', [False, True])
def test_segmentation(tmp_path, work_dir, figures, wrapped):
    """A perfect prediction looks like the ground truth, another one does not."""
    cfg, maps = segmentor(tmp_path, val=3)
    if wrapped:
        wrap(cfg)
    folder = work_dir('mmseg')
    predictions = folder / 'test' / 'predictions'
    predictions.mkdir()
    seen = set()
    for i, path in enumerate(maps):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if i < 2:
            (predictions / path.name).write_bytes(path.read_bytes())
        else:  # 1 is the background
            cv2.imwrite(str(predictions / path.name), np.ones_like(labels))
        seen |= set(np.unique(labels)) - {0}
    assert 3 < len(seen)  # some classes
    write_report(cfg, folder)
    sheet = figures[0]
    assert sheet.get_suptitle() == 'mIoU 85.3 on 3 validation images'
    assert titles(sheet)[:3] == ['image', 'ground truth', 'prediction']
    [legend] = sheet.legends
    classes = ['background', *'0123456789']
    expected = [classes[label - 1] for label in sorted(seen)]
    assert [text.get_text() for text in legend.get_texts()] == expected
    painted = [ax.images[1].get_array() for ax in sheet.axes if len(ax.images) == 2]
    assert len(painted) == 6
    equal = {
        tuple(sorted((i, j)))
        for i in range(6)
        for j in range(i)
        if np.array_equal(painted[i], painted[j])
    }
    assert len(equal) == 2  # two of three pairs


@pytest.mark.parametrize('shape', [(64, 65), (64, 64, 3), (1, 4096)])
def test_label_maps_of_another_size(tmp_path, work_dir, shape):
    """They would be stretched, however large they are."""
    cfg, (path,) = segmentor(tmp_path, val=1)
    folder = work_dir('mmseg')
    predicted = folder / 'test' / 'predictions' / path.name
    predicted.parent.mkdir()
    cv2.imwrite(str(predicted), np.ones(shape, np.uint8))
    with pytest.raises(ValueError, match=f'{path.name} is of .*no label map'):
        write_report(cfg, folder)


def classifier(tmp_path):
    """A config, and an image of its test data, of class 3."""
    pytest.importorskip('mmpretrain')
    data = digits.make_imagenet(tmp_path / 'data', train=10, val=10, size=64)
    cfg = Config.fromfile(CONFIGS / 'classification' / 'mlla-nano_digits.py')
    cfg.test_dataloader.dataset.data_root = str(data)
    return cfg, next((data / 'val' / '3').iterdir())


@pytest.mark.parametrize('wrapped', [False, True])
def test_classification(tmp_path, work_dir, figures, wrapped):
    cfg, picture = classifier(tmp_path)
    if wrapped:
        wrap(cfg)
    results = [
        dict(
            img_path=str(picture),
            pred_label=torch.tensor([predicted]),
            gt_label=torch.tensor([3]),
            pred_score=torch.full((10,), 0.1),
        )
        for predicted in (3, 5)
    ]
    write_report(cfg, work_dir('mmpretrain', results))
    sheet = figures[0]
    assert sheet.get_suptitle().startswith(
        'top-1 accuracy 97.0 % on 2 validation images'
    )
    right, wrong = (ax.title for ax in sheet.axes[:2])
    assert right.get_text() == 'ground truth: 3\nprediction: 3 (0.10)'
    assert wrong.get_text() == 'ground truth: 3\nprediction: 5 (0.10)'
    assert (right.get_color(), wrong.get_color()) == ('black', 'red')


# What a work_dir of somebody else may have.


@pytest.mark.parametrize('attack', ['exec', 'deep in weights', 'array', 'inst'])
def test_predictions_run_no_code(tmp_path, work_dir, attack):
    cfg, _ = classifier(tmp_path)
    folder = work_dir('mmpretrain')
    marker = tmp_path / 'ran'
    path = folder / 'test' / 'predictions.pkl'
    path.write_bytes(attacks(marker)[attack])
    with pytest.raises(CheckpointError, match='predictions.pkl is not loaded'):
        write_report(cfg, folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    'content', [[], 'x', [1], [{}], [dict(img_path=3)], [dict(img_path='/etc\x1b[2J')]]
)
def test_predictions_of_other_images(tmp_path, work_dir, content):
    """No file is opened that is not of the test data."""
    cfg, _ = classifier(tmp_path)
    folder = work_dir('mmpretrain', content)
    with pytest.raises(ValueError) as error:
        write_report(cfg, folder)
    said = str(error.value)
    assert 'predictions.pkl holds no predictions for the test data' in said
    assert '--out' in said and said.isprintable()


BOXES = dict(bboxes=torch.ones(1, 4), labels=torch.zeros(1, dtype=int))
ONE = dict(BOXES, scores=torch.ones(1))
MASK = dict(size=[64, 64], counts=b'0')
DAMAGED = {
    'no number of the image': dict(img_id=None),
    'no name for the number': dict(img_id=[1]),
    'nothing': dict(pred_instances=None),
    'scores of text': dict(pred_instances=dict(BOXES, scores='abc', masks=[{}])),
    'another class': dict(
        pred_instances=dict(ONE, labels=torch.tensor([99]), masks=[{}])
    ),
    'no masks': dict(pred_instances=dict(ONE, masks=[])),
    'a mask of no size': dict(pred_instances=dict(ONE, masks=[dict(counts=b'')])),
    # Masks of 2 ** 62 pixels would crash the process.
    **{
        f'a mask of {size}': dict(
            pred_instances=dict(ONE, masks=[dict(MASK, size=size)])
        )
        for size in ([2**31, 2**31], [64, 65], [-1, 64])
    },
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_detections(tmp_path, work_dir, kind):
    cfg, _, image, _ = detector(tmp_path)
    result = dict(img_path=image['img_path'], img_id=image['id'])
    folder = work_dir('mmdet', [{**result, **DAMAGED[kind]}])
    reason = 'A mask is of another size .* instead of .64' if '[' in kind else ''
    with pytest.raises(ValueError, match=f'predictions.pkl holds no .*{reason}.*--out'):
        write_report(cfg, folder)


def test_a_mask_of_the_ground_truth_that_does_not_fit(tmp_path, work_dir):
    """The predictions are not to blame."""
    cfg, _, image, _ = detector(tmp_path)
    cv2.imwrite(image['img_path'], np.zeros((80, 64, 3), np.uint8))
    nothing = dict(BOXES, scores=torch.zeros(1), masks=[{}])
    result = dict(img_path=image['img_path'], img_id=image['id'])
    folder = work_dir('mmdet', [dict(result, pred_instances=nothing)])
    with pytest.raises(ValueError, match=r'^A mask is of another size .*64.* \(80, 64'):
        write_report(cfg, folder)


@pytest.mark.parametrize(
    'change',
    [
        dict(pred_label=torch.tensor([99])),
        dict(pred_score='x'),
        dict(pred_label=None),
        dict(pred_label='x'),
    ],
)
def test_damaged_classes(tmp_path, work_dir, change):
    cfg, picture = classifier(tmp_path)
    result = dict(
        img_path=str(picture), pred_label=torch.tensor([3]), gt_label=torch.tensor([3]),
        pred_score=torch.ones(10),
    )  # fmt: skip
    folder = work_dir('mmpretrain', [{**result, **change}])
    with pytest.raises(ValueError, match='predictions.pkl holds no .*--out'):
        write_report(cfg, folder)


def test_a_curve_that_was_not_logged(tmp_path, work_dir, figures):
    cfg, picture = classifier(tmp_path)
    result = dict(img_path=str(picture), pred_score=torch.ones(10))
    result.update(dict.fromkeys(('pred_label', 'gt_label'), torch.tensor([3])))
    folder = work_dir('mmpretrain', [result])
    log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.write_text('{"loss": 1.0, "step": 1, "accuracy/top1": 97.0}')
    with pytest.raises(ValueError, match="Not logged.*'ema_accuracy/top1'.*there:"):
        write_report(cfg, folder)


@pytest.mark.parametrize('content', ['[]', '{}', '{"mIoU": "85"}', '{"mIoU": true}'])
def test_metrics_that_are_none(work_dir, content):
    folder = work_dir('mmseg')
    path = folder / 'test' / '20260101_000000' / '20260101_000000.json'
    path.write_text(content)
    cfg = Config.fromfile(CONFIGS / 'segmentation' / 'upernet_mlla-nano_digits.py')
    with pytest.raises(ValueError, match='20260101_000000.json (has|holds) no'):
        write_report(cfg, folder)
